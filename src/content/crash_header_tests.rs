//! The headers of the replayed files: real ones, which are rewritten as `kmsfs rewrap` does it, each time into the slot that is not
//! in use. `docs/FORMAT.md` section 4.

use crate::crypto::{HeaderKey, Secret, Suite, VolumeKeys};
use crate::format::geometry::PAGE_LEN;
use crate::format::header::{self, Header, HeaderPage, Record};

/// Makes headers and checks them.
pub(super) struct Headers(HeaderKey);

/// A header that holds: which of its slots, and its generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Valid {
    slot: usize,
    pub(super) generation: u64,
}

impl Headers {
    pub(super) fn new() -> Self {
        Self(VolumeKeys::derive(&Secret::random(), &[1; 16], Suite::Xaes256Gcm).header)
    }

    /// That of a new file.
    pub(super) fn first(&self) -> Box<HeaderPage> {
        let mut page = Box::new([0; PAGE_LEN]);
        self.put(&mut page, 0, 1);
        page
    }

    /// The page after a rewrite.
    pub(super) fn next(&self, page: &HeaderPage) -> Box<HeaderPage> {
        let valid = self.valid(page).expect("a header to rewrite");
        let mut next = Box::new(*page);
        self.put(&mut next, 1 - valid.slot, valid.generation + 1);
        next
    }

    fn put(&self, page: &mut HeaderPage, slot: usize, generation: u64) {
        // Records of a length that puts most sectors of a slot to use.
        let record = Record::of(1, format!("key {generation}"), vec![generation.to_le_bytes()[0] | 1; 1500]);
        let header = Header {
            suite: 1,
            generation,
            volume_id: [1; 16],
            file_id: [1; 32],
            data_key_id: [2; 16],
            records: vec![record],
            commitment: [3; 32],
        };
        let signed = header.signed_bytes().unwrap();
        header::put_slot(page, slot, &signed, &self.0.mac(&signed));
    }

    /// The valid slot with the highest generation.
    pub(super) fn valid(&self, page: &HeaderPage) -> Option<Valid> {
        let slots = header::parse_page(page).into_iter().enumerate();
        let valid = slots.filter_map(|(slot, parsed)| {
            let parsed = parsed.ok()?;
            (self.0.mac(parsed.signed) == parsed.mac).then_some(Valid { slot, generation: parsed.header.generation })
        });
        valid.max_by_key(|valid| valid.generation)
    }
}
