//! Who asks, as far as ownership and privileges matter. The kernel checks permissions; what it leaves to us is here.

use crate::keys::Behalf;

/// The process behind a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// The thread's id; 0 if it is not one that we can see.
    pub pid: u32,
    /// Bits that its new files do not get.
    pub umask: u32,
}

/// `CAP_FSETID`: set-id bits stay when the file changes.
const FSETID: u64 = 1 << 4;

impl Caller {
    /// This thread works for it until it works for another.
    pub(super) fn works_here(self) {
        Behalf::set_caller(self.uid, self.pid);
    }

    /// Whether set-id bits stay when this process changes a file. Without proof they do not.
    pub(super) fn keeps_set_ids(&self) -> bool {
        let capabilities = self.status("CapEff:").and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
        capabilities.is_some_and(|capabilities| capabilities & FSETID != 0)
    }

    /// Whether the process is in the group `gid`.
    pub(super) fn is_in_group(&self, gid: u32) -> bool {
        let among = |text: String| text.split_whitespace().any(|group| group.parse() == Ok(gid));
        self.gid == gid || self.status("Groups:").is_some_and(among)
    }

    /// A line of `/proc/PID/status`. The process waits for our answer, so it is still there.
    fn status(&self, field: &str) -> Option<String> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        text.lines().find_map(|line| line.strip_prefix(field)).map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_cannot_be_seen_keeps_nothing() {
        let caller = Caller { uid: 0, gid: 5, pid: 0, umask: 0 };
        assert!(!caller.keeps_set_ids());
        assert!(caller.is_in_group(5) && !caller.is_in_group(6));
    }

    #[test]
    fn groups_come_from_the_process() {
        let groups = rustix::process::getgroups().unwrap();
        let caller = Caller { uid: 0, gid: u32::MAX, pid: std::process::id(), umask: 0 };
        assert!(groups.iter().all(|group| caller.is_in_group(group.as_raw())));
        assert!(!caller.is_in_group(u32::MAX - 1));
    }
}
