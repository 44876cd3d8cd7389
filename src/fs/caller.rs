//! Who asks, as far as ownership and privileges matter. The kernel checks permissions; what it leaves to us is here.

use crate::keys::Behalf;
use crate::storage::Stat;

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

/// `CAP_FOWNER`: as good as the owner.
const FOWNER: u64 = 1 << 3;
/// `CAP_FSETID`: set-id bits stay when the file changes.
const FSETID: u64 = 1 << 4;
/// `/proc/PID/uid_map` of the kernel's first user namespace: no unprivileged process makes another one with it.
const FIRST_NAMESPACE: [u32; 3] = [0, 0, u32::MAX];

/// `SIGKILL` among pending signals, which every signal becomes that ends a process.
const KILL: u64 = 1 << 8;

impl Caller {
    /// Nobody that can be seen: the kernel by itself.
    pub(super) const KERNEL: Self = Self { uid: 0, gid: 0, pid: 0, umask: 0 };

    /// This thread works for it until it works for another.
    pub(super) fn works_here(self) {
        Behalf::set_caller(self.uid, self.pid);
    }

    /// Whether set-id bits stay when this process changes a file: `capable(CAP_FSETID)` of the kernel, which counts in its first
    /// user namespace only. Without proof they do not.
    pub(super) fn keeps_set_ids(&self) -> bool {
        self.is_capable(FSETID) && self.id_map("uid_map") == [FIRST_NAMESPACE]
    }

    /// Whether a set-group-id bit that does not depend on privileges alone stays: `in_group_or_capable()` of the kernel.
    pub(super) fn keeps_set_group_id(&self, file: &Stat) -> bool {
        self.is_in_group(file.gid) || self.is_capable(FSETID) && self.maps(file)
    }

    /// Whether it may do what the owner may: `inode_owner_or_capable()` of the kernel.
    pub(super) fn is_owner_of(&self, file: &Stat) -> bool {
        self.uid == file.uid || self.is_capable(FOWNER) && self.maps(file)
    }

    /// Whether the thread is to die, and waits for nothing but our answer.
    pub(super) fn is_killed(&self) -> bool {
        let Some(status) = self.status() else { return false };
        let signals = |name| field(&status, name).and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
        ["SigPnd:", "ShdPnd:"].into_iter().filter_map(signals).any(|signals| signals & KILL != 0)
    }

    /// Whether the process is in the group `gid`.
    pub(super) fn is_in_group(&self, gid: u32) -> bool {
        let among = |text: &str| text.split_whitespace().any(|group| group.parse() == Ok(gid));
        self.gid == gid || self.status().is_some_and(|status| field(&status, "Groups:").is_some_and(among))
    }

    /// Whether it has the capability in its user namespace. A number that another process has got meanwhile proves nothing.
    fn is_capable(&self, capability: u64) -> bool {
        let Some(status) = self.status() else { return false };
        let filesystem_user = field(&status, "Uid:").and_then(|ids| ids.split_whitespace().nth(3)?.parse().ok());
        let capabilities = field(&status, "CapEff:").and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
        filesystem_user == Some(self.uid) && capabilities.is_some_and(|all| all & capability != 0)
    }

    /// Whether owner and group of a file exist in its user namespace: capabilities count for no other file.
    fn maps(&self, file: &Stat) -> bool {
        let has = |map: &str, id: u32| {
            self.id_map(map).iter().any(|[_, first, count]| id.checked_sub(*first).is_some_and(|at| at < *count))
        };
        has("uid_map", file.uid) && has("gid_map", file.gid)
    }

    /// Lines of first id inside, first id outside, and their count.
    fn id_map(&self, name: &str) -> Vec<[u32; 3]> {
        let line = |line: &str| {
            let mut numbers = line.split_whitespace().map(|number| number.parse().ok());
            Some([numbers.next()??, numbers.next()??, numbers.next()??])
        };
        self.proc(name).unwrap_or_default().lines().filter_map(line).collect()
    }

    fn status(&self) -> Option<String> {
        self.proc("status")
    }

    /// A file of `/proc/PID`. The process waits for our answer, so it is still there.
    fn proc(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.pid)).ok()
    }
}

fn field<'s>(status: &'s str, name: &str) -> Option<&'s str> {
    status.lines().find_map(|line| line.strip_prefix(name))
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
