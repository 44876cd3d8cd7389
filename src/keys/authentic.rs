//! Which of a header page's slots counts, by the volume key alone: no provider is asked about a header that does not
//! authenticate.

use crate::crypto::{NameKey, Suite, VerifiedHeader};
use crate::format::header::{self, Header, HeaderError, HeaderPage, Record, Slot};

use super::cache::CacheKey;
use super::{KeyError, Ring};

/// A header whose MAC was checked.
pub struct AuthenticHeader {
    pub(super) header: Header,
    pub(super) verified: VerifiedHeader,
    /// Which of the two slots it is in.
    pub(super) slot: usize,
    pub(super) cache_key: CacheKey,
}

impl AuthenticHeader {
    /// What it says.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl Ring {
    /// Checks the MACs of a header page without asking any provider. The valid slot with the highest generation wins;
    /// `None` is a page of zeros, a header that never became durable.
    ///
    /// # Errors
    /// [`KeyError::Header`], [`KeyError::UnauthenticHeader`] or [`KeyError::UnknownSuite`] if no slot is valid.
    pub fn authenticate(&self, page: &HeaderPage) -> Result<Option<AuthenticHeader>, KeyError> {
        let [a, b] = header::parse_page(page);
        let [a, b] =
            [(a, 0), (b, 1)].map(|(slot, at)| slot.map_err(KeyError::from).and_then(|slot| self.verify(slot, at)));
        match (a, b) {
            (Ok(a), Ok(b)) => Ok(Some(if b.header.generation > a.header.generation { b } else { a })),
            (Ok(valid), Err(_)) | (Err(_), Ok(valid)) => Ok(Some(valid)),
            (Err(KeyError::Header(HeaderError::Empty)), Err(KeyError::Header(HeaderError::Empty))) => Ok(None),
            (Err(KeyError::Header(HeaderError::Empty)), Err(error)) | (Err(error), Err(_)) => Err(error),
        }
    }

    fn verify(&self, slot: Slot<'_>, at: usize) -> Result<AuthenticHeader, KeyError> {
        let header = slot.header;
        if header.volume_id != self.volume_id {
            return Err(KeyError::UnauthenticHeader);
        }
        let suite = Suite::from_id(header.suite).ok_or_else(|| KeyError::UnknownSuite(header.suite.to_string()))?;
        let verified = self
            .header_key
            .verify(slot.signed, &slot.mac, suite, header.file_id, header.commitment)
            .map_err(|_| KeyError::UnauthenticHeader)?;
        let cache_key = cache_key(&header);
        Ok(AuthenticHeader { header, verified, slot: at, cache_key })
    }
}

/// What the data key of a header is remembered by.
pub(super) fn cache_key(header: &Header) -> CacheKey {
    CacheKey { data_key_id: header.data_key_id, records: digest(&header.records) }
}

fn digest(records: &[Record]) -> [u8; 32] {
    let mut bytes = Vec::new();
    for field in records.iter().flat_map(|record| [&record.key_id, &record.wrapped]) {
        bytes.extend_from_slice(&(field.len() as u64).to_le_bytes());
        bytes.extend_from_slice(field);
    }
    NameKey::digest(&bytes)
}
