//! The header page: two slots of 2048 bytes, each of which can stand alone. `docs/FORMAT.md` section 4.
//!
//! ```text
//! magic "KMSFS" | version u8 | suite u8 | flags u8 | generation u64 | volume id 16 | file id 32 | data key id 16
//! | record count u8 | records | commitment 32 | MAC 32 | zeros
//! record = provider u8 | key id (u16 length + bytes) | wrapped key (u16 length + bytes)
//! ```

use super::geometry::PAGE_LEN;

/// A header page as it lies on disk.
pub type HeaderPage = [u8; PAGE_LEN];
/// Bytes of a slot.
pub const SLOT_LEN: usize = PAGE_LEN / 2;

const MAGIC: &[u8; 5] = b"KMSFS";
const VERSION: u8 = 1;
/// Everything of a slot but its records.
const FIXED_LEN: usize = 5 + 3 + 8 + 16 + 32 + 16 + 1 + 32 + 32;
/// The most bytes of records that a slot can hold.
pub const RECORDS_CAPACITY: usize = SLOT_LEN - FIXED_LEN;

/// Says who can unwrap the data key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The provider's tag; unknown tags are kept and skipped.
    pub provider: u8,
    /// The wrapping key as that provider names it.
    pub key_id: Vec<u8>,
    /// The data key under that wrapping key.
    pub wrapped: Vec<u8>,
}

impl Record {
    /// A record of these parts.
    #[must_use]
    pub fn of(provider: u8, key_id: String, wrapped: Vec<u8>) -> Self {
        Self { provider, key_id: key_id.into_bytes(), wrapped }
    }

    fn encoded_len(&self) -> usize {
        1 + 2 + self.key_id.len() + 2 + self.wrapped.len()
    }
}

/// The content of a slot, without its MAC. Parsed is not verified: nothing in it may be used before the MAC was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The suite's id.
    pub suite: u8,
    /// Counts up with every change; the valid slot with the highest one wins.
    pub generation: u64,
    /// The volume the file belongs to.
    pub volume_id: [u8; 16],
    /// Random; makes the file's keys its own.
    pub file_id: [u8; 32],
    /// Names the data key towards providers and in audit trails.
    pub data_key_id: [u8; 16],
    /// Who can unwrap the data key; at least one.
    pub records: Vec<Record>,
    /// Binds the data key.
    pub commitment: [u8; 32],
}

/// Why a slot does not parse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// All zeros: unused, or never durable.
    #[error("the slot is empty")]
    Empty,
    /// The magic is missing.
    #[error("not a kmsfs file header")]
    NotAHeader,
    /// A later format.
    #[error("format version {0} is not known to this program (it knows 1)")]
    UnknownVersion(u8),
    /// A flag of a later format.
    #[error("header flags {0:#04x} are not known to this program")]
    UnknownFlags(u8),
    /// Lengths, counts or padding are off.
    #[error("the header is malformed: {0}")]
    Malformed(&'static str),
    /// The records do not fit.
    #[error(
        "the wrapped keys of this file take {needed} bytes, and a header holds {RECORDS_CAPACITY}: use fewer recipients or shorter key ids"
    )]
    TooLarge {
        /// Bytes of all records.
        needed: usize,
    },
}

/// A parsed slot: the header, the bytes its MAC covers, and the MAC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot<'p> {
    /// What it says.
    pub header: Header,
    /// What the MAC covers.
    pub signed: &'p [u8],
    /// The MAC.
    pub mac: [u8; 32],
}

impl Header {
    /// The bytes that the MAC covers.
    ///
    /// # Errors
    /// [`HeaderError::TooLarge`] or [`HeaderError::Malformed`] if it has no encoding.
    pub fn signed_bytes(&self) -> Result<Vec<u8>, HeaderError> {
        let needed = self.records.iter().map(Record::encoded_len).sum();
        if needed > RECORDS_CAPACITY {
            return Err(HeaderError::TooLarge { needed });
        }
        let count = u8::try_from(self.records.len()).ok().filter(|count| *count > 0);
        let count = count.ok_or(HeaderError::Malformed("a header has 1 to 255 records"))?;
        let mut bytes = Vec::with_capacity(SLOT_LEN);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&[VERSION, self.suite, 0]);
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        bytes.extend_from_slice(&self.volume_id);
        bytes.extend_from_slice(&self.file_id);
        bytes.extend_from_slice(&self.data_key_id);
        bytes.push(count);
        for record in &self.records {
            bytes.push(record.provider);
            put_field(&mut bytes, &record.key_id);
            put_field(&mut bytes, &record.wrapped);
        }
        bytes.extend_from_slice(&self.commitment);
        Ok(bytes)
    }
}

/// The capacity check keeps every length far below 65536.
fn put_field(bytes: &mut Vec<u8>, field: &[u8]) {
    let len = u16::try_from(field.len()).unwrap_or(u16::MAX);
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(field);
}

/// Writes `signed` and its `mac` into slot `slot` (0 or 1) of `page`, and leaves the other one as it is.
///
/// # Panics
/// If `signed` is longer than [`Header::signed_bytes`] makes it.
pub fn put_slot(page: &mut HeaderPage, slot: usize, signed: &[u8], mac: &[u8; 32]) {
    let bytes = &mut page[slot * SLOT_LEN..][..SLOT_LEN];
    bytes.fill(0);
    bytes[..signed.len()].copy_from_slice(signed);
    bytes[signed.len()..signed.len() + 32].copy_from_slice(mac);
}

/// Both slots of a header page.
pub fn parse_page(page: &HeaderPage) -> [Result<Slot<'_>, HeaderError>; 2] {
    let (a, b) = page.split_at(SLOT_LEN);
    [parse_slot(a), parse_slot(b)]
}

fn parse_slot(bytes: &[u8]) -> Result<Slot<'_>, HeaderError> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Err(HeaderError::Empty);
    }
    let mut rest = Reader(bytes);
    if &rest.array::<5>()? != MAGIC {
        return Err(HeaderError::NotAHeader);
    }
    let [version, suite, flags] = rest.array()?;
    if version != VERSION {
        return Err(HeaderError::UnknownVersion(version));
    }
    if flags != 0 {
        return Err(HeaderError::UnknownFlags(flags));
    }
    let header = Header {
        suite,
        generation: u64::from_le_bytes(rest.array()?),
        volume_id: rest.array()?,
        file_id: rest.array()?,
        data_key_id: rest.array()?,
        records: rest.records()?,
        commitment: rest.array()?,
    };
    let signed = &bytes[..bytes.len() - rest.0.len()];
    let mac = rest.array()?;
    if rest.0.iter().any(|byte| *byte != 0) {
        return Err(HeaderError::Malformed("bytes after the MAC"));
    }
    Ok(Slot { header, signed, mac })
}

/// What of a slot is still to be read.
struct Reader<'p>(&'p [u8]);

impl<'p> Reader<'p> {
    fn take(&mut self, len: usize) -> Result<&'p [u8], HeaderError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(HeaderError::Malformed("a field ends past the slot"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], HeaderError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn field(&mut self) -> Result<Vec<u8>, HeaderError> {
        let len = u16::from_le_bytes(self.array()?);
        Ok(self.take(len.into())?.to_vec())
    }

    fn records(&mut self) -> Result<Vec<Record>, HeaderError> {
        let [count] = self.array()?;
        if count == 0 {
            return Err(HeaderError::Malformed("no record"));
        }
        (0..count)
            .map(|_| {
                let [provider] = self.array()?;
                Ok(Record { provider, key_id: self.field()?, wrapped: self.field()? })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            suite: 1,
            generation: 7,
            volume_id: [1; 16],
            file_id: [2; 32],
            data_key_id: [3; 16],
            records: vec![
                Record { provider: 1, key_id: b"key".to_vec(), wrapped: vec![9; 60] },
                Record { provider: 200, key_id: vec![], wrapped: vec![] },
            ],
            commitment: [4; 32],
        }
    }

    fn page_of(header: &Header) -> HeaderPage {
        let mut page = [0; PAGE_LEN];
        put_slot(&mut page, 0, &header.signed_bytes().unwrap(), &[5; 32]);
        page
    }

    #[test]
    fn a_slot_round_trips_and_leaves_the_other_alone() {
        let mut page = page_of(&header());
        let second = Header { generation: 8, ..header() };
        put_slot(&mut page, 1, &second.signed_bytes().unwrap(), &[6; 32]);
        let [a, b] = parse_page(&page);
        assert_eq!((a.as_ref().unwrap().header.clone(), a.unwrap().mac), (header(), [5; 32]));
        assert_eq!((b.as_ref().unwrap().header.clone(), b.unwrap().mac), (second, [6; 32]));
    }

    #[test]
    fn every_defect_has_its_own_error() {
        let broken = |at: usize, value: u8| {
            let mut page = page_of(&header());
            page[at] = value;
            parse_page(&page)[0].clone().unwrap_err()
        };
        assert_eq!(parse_page(&[0; PAGE_LEN])[0], Err(HeaderError::Empty));
        assert_eq!(broken(0, b'X'), HeaderError::NotAHeader);
        assert_eq!(broken(5, 2), HeaderError::UnknownVersion(2));
        assert_eq!(broken(7, 0x80), HeaderError::UnknownFlags(0x80));
        assert_eq!(broken(80, 0), HeaderError::Malformed("no record"));
        assert_eq!(broken(80, 255), HeaderError::Malformed("a field ends past the slot"));
        assert_eq!(broken(SLOT_LEN - 1, 1), HeaderError::Malformed("bytes after the MAC"));
    }

    #[test]
    fn what_does_not_fit_says_how_much() {
        let wrapped = vec![0; RECORDS_CAPACITY - 5];
        let fits = Header { records: vec![Record { provider: 1, key_id: vec![], wrapped }], ..header() };
        assert_eq!(parse_page(&page_of(&fits))[0].as_ref().unwrap().header, fits);
        let wrapped = vec![0; 6144];
        let large = Header { records: vec![Record { provider: 1, key_id: vec![], wrapped }], ..header() };
        assert_eq!(large.signed_bytes(), Err(HeaderError::TooLarge { needed: 6149 }));
        assert!(Header { records: vec![], ..header() }.signed_bytes().is_err());
    }

    proptest! {
        #[test]
        fn parsing_is_strict_and_never_panics(at in 0..SLOT_LEN, value: u8, tail in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut page = page_of(&header());
            page[at] = value;
            let start = SLOT_LEN - tail.len();
            if at % 3 == 0 { page[start..SLOT_LEN].copy_from_slice(&tail); }
            if let Ok(slot) = &parse_page(&page)[0] {
                let mut again = [0; PAGE_LEN];
                put_slot(&mut again, 0, &slot.header.signed_bytes().unwrap(), &slot.mac);
                prop_assert!(again == page);
            }
        }
    }
}
