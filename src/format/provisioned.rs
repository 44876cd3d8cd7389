//! A provisioned key: a wrapped data key that no file uses yet, in a small file of its own. `docs/FORMAT.md` section 8.1.
//!
//! ```text
//! magic "KMSFSPK" | version u8 | volume id 16 | data key id 16 | record | MAC 32
//! record = provider u8 | key id (u16 length + bytes) | wrapped key (u16 length + bytes)
//! ```

use super::header::{RECORDS_CAPACITY, Record};
pub use super::signed::seal;
use super::signed::{MAC_LEN, Signed};

const MAGIC: &[u8; 7] = b"KMSFSPK";
const VERSION: u8 = 1;
/// Everything but the record.
const FIXED_LEN: usize = 7 + 1 + 16 + 16 + MAC_LEN;
/// The longest file of a provisioned key, in bytes.
pub const MAX_LEN: usize = FIXED_LEN + RECORDS_CAPACITY;

/// What such a file says. Parsed is not verified: nothing in it may be used before the MAC was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProvisionedKey {
    /// The volume whose files may use it.
    pub volume_id: [u8; 16],
    /// Names the data key towards providers and in audit trails.
    pub data_key_id: [u8; 16],
    /// Who can unwrap it.
    pub record: Record,
}

impl ProvisionedKey {
    /// The bytes that the MAC covers; none if no header could hold the record.
    #[must_use]
    pub fn signed_bytes(&self) -> Option<Vec<u8>> {
        let Record { provider, key_id, wrapped } = &self.record;
        if 5 + key_id.len() + wrapped.len() > RECORDS_CAPACITY {
            return None;
        }
        let mut bytes = Vec::with_capacity(MAX_LEN);
        bytes.extend_from_slice(MAGIC);
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.volume_id);
        bytes.extend_from_slice(&self.data_key_id);
        bytes.push(*provider);
        for field in [key_id, wrapped] {
            bytes.extend_from_slice(&u16::try_from(field.len()).ok()?.to_le_bytes());
            bytes.extend_from_slice(field);
        }
        Some(bytes)
    }
}

/// Parses a file; none if it is not that of a provisioned key, or of a later version.
#[must_use]
pub fn parse(file: &[u8]) -> Option<Signed<'_, ProvisionedKey>> {
    if file.len() > MAX_LEN {
        return None;
    }
    let (signed, mac) = file.split_last_chunk()?;
    let rest = signed.strip_prefix(MAGIC)?.strip_prefix(&[VERSION])?;
    let (volume_id, rest) = rest.split_first_chunk()?;
    let (data_key_id, rest) = rest.split_first_chunk()?;
    let (provider, rest) = rest.split_first()?;
    let (key_id, rest) = field(rest)?;
    let (wrapped, rest) = field(rest)?;
    let record = Record { provider: *provider, key_id: key_id.to_vec(), wrapped: wrapped.to_vec() };
    let key = ProvisionedKey { volume_id: *volume_id, data_key_id: *data_key_id, record };
    rest.is_empty().then_some(Signed { content: key, signed, mac: *mac })
}

fn field(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(u16::from_le_bytes(*len).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(wrapped: usize) -> ProvisionedKey {
        let record = Record { provider: 2, key_id: b"key".to_vec(), wrapped: vec![9; wrapped] };
        ProvisionedKey { volume_id: [1; 16], data_key_id: [2; 16], record }
    }

    #[test]
    fn round_trips_up_to_what_a_header_holds() {
        for wrapped in [0, 184, RECORDS_CAPACITY - 8] {
            let signed = key(wrapped).signed_bytes().unwrap();
            let file = seal(signed.clone(), &[5; 32]);
            assert!(file.len() <= MAX_LEN);
            assert_eq!(parse(&file), Some(Signed { content: key(wrapped), signed: &signed, mac: [5; 32] }));
        }
        assert_eq!(key(RECORDS_CAPACITY - 7).signed_bytes(), None);
    }

    #[test]
    fn a_file_that_was_cut_or_lengthened_does_not_parse() {
        let file = seal(key(184).signed_bytes().unwrap(), &[5; 32]);
        for len in 0..file.len() {
            assert_eq!(parse(&file[..len]), None, "{len}");
        }
        assert_eq!(parse(&[&file[..], &[0]].concat()), None);
        assert_eq!(parse(&vec![0; MAX_LEN + 1]), None);
        let later = [&file[..7], &[2], &file[8..]].concat();
        assert_eq!(parse(&later), None);
    }

    proptest! {
        #[test]
        fn parsing_is_strict(at in 0..250_usize, value: u8) {
            let mut file = seal(key(184).signed_bytes().unwrap(), &[5; 32]);
            let at = at.min(file.len() - 1);
            file[at] = value;
            if let Some(parsed) = parse(&file) {
                prop_assert_eq!(seal(parsed.content.signed_bytes().unwrap(), &parsed.mac), file);
            }
        }
    }
}
