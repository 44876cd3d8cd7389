//! Which process this is, of which host: what a lease says of its holder, and whether another's holder has ended.

use std::fs;
use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;
use rustix::process::{Pid, getpid, test_kill_process};

use crate::format::lease::{Lease, shown_host};

/// This process, of this boot of this host. Read once: a sandbox may hide it later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Zeros if the machine has none.
    pub machine_id: [u8; 16],
    /// Zeros if the kernel does not tell.
    pub boot_id: [u8; 16],
    /// The namespace that numbers processes; 0 if the kernel does not tell.
    pub process_namespace: u64,
    /// This process.
    pub process: u32,
    /// When it began; 0 if the kernel does not tell.
    pub start: u64,
    /// The host's name.
    pub name: String,
}

impl Host {
    /// This process.
    #[must_use]
    pub fn of_process() -> Self {
        let id = |path: &str| fs::read_to_string(path).ok().and_then(|text| id_of(&text)).unwrap_or_default();
        let process = getpid();
        Self {
            machine_id: id("/etc/machine-id"),
            boot_id: id("/proc/sys/kernel/random/boot_id"),
            process_namespace: fs::metadata("/proc/self/ns/pid").map_or(0, |found| found.ino()),
            process: process.as_raw_nonzero().get().unsigned_abs(),
            start: start_of(process).unwrap_or(0),
            name: shown_host(&rustix::system::uname().nodename().to_string_lossy()),
        }
    }

    /// Whether the holder of `lease` has certainly ended: its process was one of this boot, or it was one of an earlier boot of
    /// this host.
    #[must_use]
    pub fn knows_ended(&self, lease: &Lease) -> bool {
        let is_here = self.machine_id != [0; 16] && (self.machine_id, &self.name) == (lease.machine_id, &lease.host);
        if self.boot_id == [0; 16] || lease.boot_id == [0; 16] {
            return false;
        }
        if self.boot_id != lease.boot_id {
            return is_here;
        }
        // Of another namespace the number of a process means nothing here.
        self.process_namespace != 0 && self.process_namespace == lease.process_namespace && has_ended(lease)
    }
}

fn has_ended(lease: &Lease) -> bool {
    let Some(pid) = i32::try_from(lease.process).ok().and_then(Pid::from_raw) else { return false };
    match test_kill_process(pid) {
        Err(Errno::SRCH) => true,
        _ => start_of(pid).is_some_and(|start| lease.start != 0 && start != lease.start),
    }
}

/// When a process began, in ticks since the boot; a dead one that nobody has waited for never did.
fn start_of(process: Pid) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero())).ok()?;
    // The program's name, in brackets, may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let is_dead = matches!(fields.next()?, "Z" | "X");
    if is_dead { Some(0) } else { fields.nth(18)?.parse().ok() }
}

/// 32 hexadecimal digits, as a machine has them, or with hyphens, as the kernel writes a boot.
fn id_of(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let number = u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 32)?;
    Some(number.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::lease::EXCLUSIVE;

    fn held_by(host: &Host) -> Lease {
        Lease {
            mode: EXCLUSIVE,
            local: false,
            volume_id: [0; 16],
            lease_id: [0; 16],
            machine_id: host.machine_id,
            boot_id: host.boot_id,
            process_namespace: host.process_namespace,
            process: host.process,
            start: host.start,
            renewals: 0,
            time: 0,
            host: host.name.clone(),
        }
    }

    #[test]
    fn only_what_is_certain_counts_as_ended() {
        let me = Host { machine_id: [1; 16], ..Host::of_process() };
        assert!(me.start > 0 && me.boot_id != [0; 16] && me.process_namespace > 0, "{me:?}");
        let mine = held_by(&me);
        assert!(!me.knows_ended(&mine), "this process has not");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let dead = Lease { process: child.id(), start: me.start, ..mine.clone() };
        child.wait().unwrap();
        for (ended, lease) in [
            (true, dead.clone()),
            (true, Lease { start: mine.start - 1, ..mine.clone() }),
            (false, Lease { process_namespace: 1, ..dead.clone() }),
            (false, Lease { process_namespace: 0, ..dead.clone() }),
            (true, Lease { boot_id: [9; 16], ..mine.clone() }),
            (false, Lease { boot_id: [0; 16], ..dead.clone() }),
            (false, Lease { boot_id: [9; 16], host: "twin".into(), ..mine.clone() }),
            (false, Lease { boot_id: [9; 16], machine_id: [2; 16], ..mine.clone() }),
            (false, Lease { boot_id: [9; 16], machine_id: [2; 16], ..dead.clone() }),
        ] {
            assert_eq!(me.knows_ended(&lease), ended, "{lease:?}");
        }
        let nameless = Host { machine_id: [0; 16], ..me };
        let lease = Lease { boot_id: [9; 16], ..held_by(&nameless) };
        assert!(!nameless.knows_ended(&lease), "machines without an id are not the same one");
    }

    #[test]
    fn a_process_that_nobody_waited_for_has_ended() {
        let me = Host::of_process();
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let lease = Lease { process: child.id(), start: start_of(pid).unwrap(), ..held_by(&me) };
        assert!(!me.knows_ended(&lease));
        child.kill().unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !me.knows_ended(&lease) {
            assert!(std::time::Instant::now() < until);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        child.wait().unwrap();
    }

    #[test]
    fn ids_are_read_in_both_spellings() {
        assert_eq!(id_of("00112233445566778899aabbccddeeff\n"), id_of("00112233-4455-6677-8899-aabbccddeeff"));
        assert_eq!(id_of("00112233445566778899aabbccddeeff").unwrap()[1], 0x11);
        for nonsense in ["", "uninitialized", "00", "+0112233445566778899aabbccddeef", "ä"] {
            assert_eq!(id_of(nonsense), None, "{nonsense}");
        }
    }
}
