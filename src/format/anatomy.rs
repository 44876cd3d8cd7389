//! Where the fields of a header slot and of a page lie, for those who show them. Computed from what a slot says, so a layout is
//! described once: in `header` and in `page`.

use std::ops::Range;

use super::header::{Header, SLOT_LEN};
use super::page::part;

/// A field, and where its bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// What it is called.
    pub name: &'static str,
    /// What it is for.
    pub meaning: &'static str,
    /// Its bytes, counted from the start of the slot or page.
    pub range: Range<usize>,
}

/// The fields of the slot that `header` was parsed from, without gaps, up to the end of the slot.
#[must_use]
pub fn of_slot(header: &Header) -> Vec<Field> {
    let mut fields = Fields { end: 0, fields: Vec::new() };
    fields.put("magic", "says that this is a kmsfs file", 5);
    fields.put("version", "of the format", 1);
    fields.put("suite", "which cipher seals the pages", 1);
    fields.put("flags", "none in this version", 1);
    fields.put("generation", "counts changes; the newer of two slots wins", 8);
    fields.put("volume id", "the volume that the file belongs to", header.volume_id.len());
    fields.put("file id", "random; makes this file's keys its own", header.file_id.len());
    fields.put("data key id", "names the data key in the KMS's audit trail", header.data_key_id.len());
    fields.put("records", "how many keys can open the data key", 1);
    for record in &header.records {
        fields.put(
            "provider",
            "unwraps the data key: 1 local keyring, 2 AWS KMS, 3 Vault or OpenBao, 4 PKCS #11, 5 age",
            1,
        );
        fields.put("key id", "the wrapping key, after its length", 2 + record.key_id.len());
        fields.put(
            "wrapped key",
            "the data key as the provider encrypted it, after its length",
            2 + record.wrapped.len(),
        );
    }
    fields.put("commitment", "a fingerprint of the data key: no other one is accepted", header.commitment.len());
    fields.put("MAC", "authenticates everything above under the volume key", 32);
    fields.put("padding", "zeros", SLOT_LEN.saturating_sub(fields.end));
    fields.fields
}

/// The parts of a page.
#[must_use]
pub fn of_page() -> [Field; 4] {
    let part = |name, meaning, range| Field { name, meaning, range };
    [
        part("nonce", "new for every write", part::NONCE),
        part("ciphertext", "4048 bytes of content", part::CIPHERTEXT),
        part("trailer", "how many bytes count, and whether it is the last page", part::TRAILER),
        part("tag", "authenticates content, place in the file and trailer", part::TAG),
    ]
}

struct Fields {
    end: usize,
    fields: Vec<Field>,
}

impl Fields {
    fn put(&mut self, name: &'static str, meaning: &'static str, len: usize) {
        let range = self.end..self.end + len;
        self.end = range.end;
        self.fields.push(Field { name, meaning, range });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::geometry::PAGE_LEN;
    use crate::format::header::{Record, put_slot};

    #[test]
    fn fields_lie_where_the_encoding_puts_them() {
        let header = Header {
            suite: 1,
            generation: 7,
            volume_id: [1; 16],
            file_id: [2; 32],
            data_key_id: [3; 16],
            records: vec![Record::of(2, "key".to_owned(), vec![9; 60]), Record::of(1, String::new(), vec![8; 5])],
            commitment: [4; 32],
        };
        let mut page = [0; PAGE_LEN];
        put_slot(&mut page, 0, &header.signed_bytes().unwrap(), &[5; 32]);
        let fields = of_slot(&header);
        let bytes = |name: &str| {
            fields.iter().filter(|field| field.name == name).map(|field| &page[field.range.clone()]).collect::<Vec<_>>()
        };
        assert_eq!(bytes("magic"), [b"KMSFS"]);
        assert_eq!(bytes("generation"), [7_u64.to_le_bytes()]);
        assert_eq!(bytes("file id"), [[2; 32]]);
        assert_eq!(bytes("records"), [[2]]);
        assert_eq!((bytes("key id")[0], bytes("wrapped key")[0].len()), (&b"\x03\0key"[..], 62));
        assert_eq!((bytes("commitment"), bytes("MAC")), (vec![&[4; 32][..]], vec![&[5; 32][..]]));
        assert!(bytes("padding")[0].iter().all(|byte| *byte == 0));
        let ends: Vec<_> = fields.iter().map(|field| field.range.end).collect();
        assert!(fields.iter().skip(1).map(|field| field.range.start).eq(ends[..ends.len() - 1].iter().copied()));
        assert_eq!(ends.last(), Some(&SLOT_LEN));
        assert_eq!(of_page().map(|field| field.range.len()).iter().sum::<usize>(), PAGE_LEN);
    }
}
