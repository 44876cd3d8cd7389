//! The lease of a volume: who writes it, in a small file beside its lock. `docs/FORMAT.md` section 8.2.
//!
//! ```text
//! magic "KMSFSWL" | version u8 | mode u8 | flags u8 | volume id 16 | lease id 16 | machine id 16 | boot id 16
//! | process namespace u64 | process u32 | start u64 | renewals u64 | time u64 | host length u8 | host 64 | MAC 32
//! ```

use std::fmt;

pub use super::signed::seal;
use super::signed::{MAC_LEN, Signed};

const MAGIC: &[u8; 7] = b"KMSFSWL";
const VERSION: u8 = 1;
const HOST_LEN: usize = 64;
const LOCAL: u8 = 1;
/// A lease in bytes: no more of a file is read.
pub const LEN: usize = 7 + 3 + 4 * 16 + 8 + 4 + 3 * 8 + 1 + HOST_LEN + MAC_LEN;
/// The mode of a lease whose holder is the only writer.
pub const EXCLUSIVE: u8 = 1;

/// What such a file says. Parsed is not verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// How the volume is used: [`EXCLUSIVE`], or by a later version in another way.
    pub mode: u8,
    /// The holder reaches the volume on a filesystem of its own kernel, whose locks hold for everybody.
    pub local: bool,
    /// The volume.
    pub volume_id: [u8; 16],
    /// Of this use of the volume; random.
    pub lease_id: [u8; 16],
    /// The machine; zeros if it does not tell.
    pub machine_id: [u8; 16],
    /// The machine's boot; zeros if it does not tell.
    pub boot_id: [u8; 16],
    /// The namespace that numbers the process; 0 if that is not known.
    pub process_namespace: u64,
    /// The process.
    pub process: u32,
    /// When that began, in the kernel's ticks since the boot; 0 if that is not known.
    pub start: u64,
    /// How often it was renewed.
    pub renewals: u64,
    /// When it was last renewed, in seconds since 1970 by the holder's clock. For people: nobody compares it.
    pub time: u64,
    /// The host's name.
    pub host: String,
}

impl Lease {
    /// The bytes that the MAC covers.
    #[must_use]
    pub fn signed_bytes(&self) -> Vec<u8> {
        let host = shown_host(&self.host);
        let mut bytes = Vec::with_capacity(LEN);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&[VERSION, self.mode, if self.local { LOCAL } else { 0 }]);
        for id in [&self.volume_id, &self.lease_id, &self.machine_id, &self.boot_id] {
            bytes.extend_from_slice(id);
        }
        bytes.extend_from_slice(&self.process_namespace.to_le_bytes());
        bytes.extend_from_slice(&self.process.to_le_bytes());
        for number in [self.start, self.renewals, self.time] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.push(u8::try_from(host.len()).unwrap_or(0));
        bytes.extend_from_slice(host.as_bytes());
        bytes.resize(LEN - MAC_LEN, 0);
        bytes
    }
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = if self.host.is_empty() { "a host without a name" } else { &self.host };
        write!(f, "process {} on {host}", self.process)
    }
}

/// A host's name as a lease holds it: what else than letters, digits, `-`, `_` and `.` is in it becomes `?`.
#[must_use]
pub fn shown_host(name: &str) -> String {
    name.chars().map(|c| if is_plain(c) { c } else { '?' }).take(HOST_LEN).collect()
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_.?".contains(c)
}

/// Parses a file; none if it is not that of a lease, or of a later version.
#[must_use]
pub fn parse(file: &[u8]) -> Option<Signed<'_, Lease>> {
    if file.len() != LEN {
        return None;
    }
    let (signed, mac) = file.split_last_chunk()?;
    let rest = signed.strip_prefix(MAGIC)?.strip_prefix(&[VERSION])?;
    let ([mode, flags], rest) = rest.split_first_chunk()?;
    let (volume_id, rest) = rest.split_first_chunk()?;
    let (lease_id, rest) = rest.split_first_chunk()?;
    let (machine_id, rest) = rest.split_first_chunk()?;
    let (boot_id, rest) = rest.split_first_chunk()?;
    let (process_namespace, rest) = rest.split_first_chunk()?;
    let (process, rest) = rest.split_first_chunk()?;
    let (start, rest) = rest.split_first_chunk()?;
    let (renewals, rest) = rest.split_first_chunk()?;
    let (time, rest) = rest.split_first_chunk()?;
    let (host_len, rest) = rest.split_first()?;
    let (host, padding) = rest.split_at_checked((*host_len).into())?;
    let host = std::str::from_utf8(host).ok().filter(|host| host.chars().all(is_plain))?;
    let lease = Lease {
        mode: *mode,
        local: *flags == LOCAL,
        volume_id: *volume_id,
        lease_id: *lease_id,
        machine_id: *machine_id,
        boot_id: *boot_id,
        process_namespace: u64::from_le_bytes(*process_namespace),
        process: u32::from_le_bytes(*process),
        start: u64::from_le_bytes(*start),
        renewals: u64::from_le_bytes(*renewals),
        time: u64::from_le_bytes(*time),
        host: host.to_owned(),
    };
    let strict = *flags <= LOCAL && padding.iter().all(|byte| *byte == 0);
    strict.then_some(Signed { content: lease, signed, mac: *mac })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lease(host: &str) -> Lease {
        Lease {
            mode: EXCLUSIVE,
            local: true,
            volume_id: [1; 16],
            lease_id: [2; 16],
            machine_id: [3; 16],
            boot_id: [4; 16],
            process_namespace: 5,
            process: 6,
            start: 7,
            renewals: 8,
            time: 9,
            host: host.to_owned(),
        }
    }

    #[test]
    fn round_trips_whatever_the_host_is_called() {
        let long = "ä".repeat(70);
        for (host, read) in [("db-1.example", "db-1.example"), ("", ""), ("a\n\x1b[", "a???"), (&long, &"?".repeat(64))]
        {
            let file = seal(lease(host).signed_bytes(), &[5; 32]);
            assert_eq!(file.len(), LEN);
            assert_eq!(parse(&file).unwrap().content, lease(read));
        }
    }

    #[test]
    fn a_file_that_was_cut_or_lengthened_does_not_parse() {
        let file = seal(lease("host").signed_bytes(), &[5; 32]);
        for len in 0..file.len() {
            assert_eq!(parse(&file[..len]), None, "{len}");
        }
        assert_eq!(parse(&[&file[..], &[0]].concat()), None);
    }

    proptest! {
        #[test]
        fn parsing_is_strict(at in 0..LEN, value: u8) {
            let mut file = seal(lease("host").signed_bytes(), &[5; 32]);
            file[at] = value;
            if let Some(parsed) = parse(&file) {
                prop_assert_eq!(seal(parsed.content.signed_bytes(), &parsed.mac), file);
            }
        }
    }
}
