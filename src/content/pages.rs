//! Sealing and opening single pages, from one buffer into another.

use crate::crypto::AeadSession;
use crate::format::geometry::{PAGE_LEN, PAYLOAD_LEN, PageIndex};
use crate::format::page::{self, Page, Trailer, part};

use super::ContentError;

/// What a page on disk turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// 4096 zero bytes; the plaintext is zeros.
    Hole,
    /// A box that authenticated.
    Sealed(Trailer),
}

impl Opened {
    /// How many bytes count, if it is the last page.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // no page has a length of 0
    pub fn len(self) -> usize {
        match self {
            Self::Hole => PAYLOAD_LEN,
            Self::Sealed(trailer) => trailer.len.into(),
        }
    }
}

/// Opens `disk`, the page `index`, into `plain` (4048 bytes).
///
/// A box is authenticated before its trailer is believed. On an error the content of `plain` must not be used.
///
/// # Errors
/// [`ContentError::Unauthentic`] or [`ContentError::BadTrailer`].
pub fn open(
    session: &mut AeadSession<'_>,
    index: PageIndex,
    disk: &Page,
    plain: &mut [u8],
) -> Result<Opened, ContentError> {
    if page::is_hole(disk) {
        plain.fill(0);
        return Ok(Opened::Hole);
    }
    let (mut nonce, mut trailer, mut tag) = ([0; 24], [0; 8], [0; 16]);
    nonce.copy_from_slice(&disk[part::NONCE]);
    trailer.copy_from_slice(&disk[part::TRAILER]);
    tag.copy_from_slice(&disk[part::TAG]);
    let data = page::associated_data(index, trailer);
    session
        .open(&nonce, &data, &disk[part::CIPHERTEXT], &tag, plain)
        .map_err(|_| ContentError::Unauthentic { page: index.0 })?;
    Trailer::parse(disk).map(Opened::Sealed).map_err(|_| ContentError::BadTrailer { page: index.0 })
}

/// Seals `plain` (4048 bytes) into `disk` as the page `index`.
pub(super) fn seal(
    session: &mut AeadSession<'_>,
    nonce: &[u8; 24],
    index: PageIndex,
    trailer: Trailer,
    plain: &[u8],
    disk: &mut Page,
) {
    let trailer = trailer.encode();
    let data = page::associated_data(index, trailer);
    disk[part::NONCE].copy_from_slice(nonce);
    let tag = session.seal(nonce, &data, plain, &mut disk[part::CIPHERTEXT]);
    disk[part::TRAILER].copy_from_slice(&trailer);
    disk[part::TAG].copy_from_slice(&tag);
}

/// The whole pages of a disk buffer.
pub(super) fn each(buffer: &[u8]) -> impl Iterator<Item = &Page> {
    buffer.as_chunks::<PAGE_LEN>().0.iter()
}

/// The whole pages of a disk buffer, to fill.
pub(super) fn each_mut(buffer: &mut [u8]) -> impl Iterator<Item = &mut Page> {
    buffer.as_chunks_mut::<PAGE_LEN>().0.iter_mut()
}
