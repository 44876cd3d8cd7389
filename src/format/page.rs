//! The layout of a sealed page: `nonce 24 | ciphertext 4048 | trailer 8 | tag 16`. `docs/FORMAT.md` section 3.

use super::geometry::{PAGE_LEN, PAYLOAD_LEN, PageIndex};

/// A page as it lies on disk.
pub type Page = [u8; PAGE_LEN];
/// The plaintext of a page, zero past its length.
pub type Payload = [u8; PAYLOAD_LEN];

/// Where the parts of a page lie.
pub mod part {
    use std::ops::Range;
    /// 24 bytes.
    pub const NONCE: Range<usize> = 0..24;
    /// 4048 bytes.
    pub const CIPHERTEXT: Range<usize> = 24..4072;
    /// 8 bytes.
    pub const TRAILER: Range<usize> = 4072..4080;
    /// 16 bytes.
    pub const TAG: Range<usize> = 4080..4096;
}

/// What a page says about itself; authenticated, not secret. `len u16 | flags u16 | reserved u32`, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// How many bytes of the payload count, if this is the last page of an aligned file: 1 to 4048.
    pub len: u16,
    /// The page was written as the last one of its file.
    pub last: bool,
}

const LAST: u16 = 1;
const _: () = assert!(Trailer::INNER.len as usize == PAYLOAD_LEN);

/// A trailer that no writer of version 1 writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the page's trailer is not of format version 1")]
pub struct BadTrailer;

impl Trailer {
    /// The trailer of a page with others after it.
    pub const INNER: Self = Self { len: 4048, last: false };

    /// The trailer of a last page with `len` bytes.
    #[must_use]
    pub fn last(len: usize) -> Self {
        Self { len: u16::try_from(len.min(PAYLOAD_LEN)).unwrap_or(Self::INNER.len), last: true }
    }

    /// The eight bytes on disk.
    #[must_use]
    pub fn encode(self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&self.len.to_le_bytes());
        bytes[2..4].copy_from_slice(&(if self.last { LAST } else { 0 }).to_le_bytes());
        bytes
    }

    /// The trailer of `page`. It means nothing before the page has been authenticated, other than as a size hint.
    ///
    /// # Errors
    /// [`BadTrailer`] for unknown flags, reserved bits or an impossible length.
    pub fn parse(page: &Page) -> Result<Self, BadTrailer> {
        let bytes = &page[part::TRAILER];
        let len = u16::from_le_bytes([bytes[0], bytes[1]]);
        let flags = u16::from_le_bytes([bytes[2], bytes[3]]);
        if !(1..=Self::INNER.len).contains(&len) || flags & !LAST != 0 || bytes[4..] != [0; 4] {
            return Err(BadTrailer);
        }
        Ok(Self { len, last: flags & LAST != 0 })
    }
}

/// What is authenticated besides the payload: `page index u64 | trailer 8`, little-endian.
#[must_use]
pub fn associated_data(index: PageIndex, trailer: [u8; 8]) -> [u8; 16] {
    let mut data = [0; 16];
    data[..8].copy_from_slice(&index.0.to_le_bytes());
    data[8..].copy_from_slice(&trailer);
    data
}

/// Whether the page is 4096 zero bytes: a hole, which reads as zeros and authenticates nothing.
#[must_use]
pub fn is_hole(page: &Page) -> bool {
    // A sealed page begins with a random nonce, so the comparison nearly always ends at its first bytes.
    page[..16] == [0; 16] && page.iter().all(|byte| *byte == 0)
}

/// The nonce of the `k`-th page of a write request whose random base is `base`: the first 16 bytes are the request's, the
/// last 8 count up from the base, little-endian and wrapping.
#[must_use]
pub fn nonce(base: &[u8; 24], k: u64) -> [u8; 24] {
    let mut nonce = *base;
    let mut counter = [0; 8];
    counter.copy_from_slice(&base[16..]);
    nonce[16..].copy_from_slice(&u64::from_le_bytes(counter).wrapping_add(k).to_le_bytes());
    nonce
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_with(trailer: [u8; 8]) -> Page {
        let mut page = [0; PAGE_LEN];
        page[part::TRAILER].copy_from_slice(&trailer);
        page
    }

    #[test]
    fn trailers_round_trip_and_refuse() {
        for trailer in [Trailer::INNER, Trailer::last(1), Trailer::last(4048)] {
            assert_eq!(Trailer::parse(&page_with(trailer.encode())), Ok(trailer));
        }
        for bad in [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0xd1, 0x0f, 0, 0, 0, 0, 0, 0],
            [1, 0, 2, 0, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0, 0, 1],
        ] {
            assert_eq!(Trailer::parse(&page_with(bad)), Err(BadTrailer), "{bad:?}");
        }
    }

    #[test]
    fn holes_are_all_zero() {
        assert!(is_hole(&[0; PAGE_LEN]));
        for at in [0, 24, 4072, 4095] {
            let mut page = [0; PAGE_LEN];
            page[at] = 1;
            assert!(!is_hole(&page), "{at}");
        }
    }

    #[test]
    fn nonces_of_a_request_differ_and_share_their_prefix() {
        let base = [0xff; 24];
        let nonces: Vec<_> = (0..1000).map(|k| nonce(&base, k)).collect();
        assert!(nonces.iter().all(|n| n[..16] == base[..16]));
        let distinct: std::collections::HashSet<_> = nonces.iter().collect();
        assert_eq!(distinct.len(), 1000);
    }
}
