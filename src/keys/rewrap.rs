//! Bringing a data key under other wrapping keys, without touching what it seals.
//!
//! Invariants: a new header says everything that the old one said but its records; the slot that holds the old one stays as
//! it is; records of providers that are not known here are kept.

use crate::crypto::{DataKey, FileKeys, Suite, commitment};
use crate::format::header::{self, Header, HeaderPage, Record};

use super::authentic::AuthenticHeader;
use super::recipients::Watched;
use super::ring::Ring;
use super::{EncryptionContext, KeyError, ProviderErrorKind, ProviderKind};

/// A wrapping key that a header is to have a record of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Whose key it is.
    pub kind: ProviderKind,
    /// The key as its provider names it.
    pub key: String,
}

/// What is missing in a header, in calls of providers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// ReEncrypt.
    pub rewrap: u64,
    /// Decrypt.
    pub unwrap: u64,
    /// Encrypt.
    pub wrap: u64,
    /// Those of them that AWS KMS takes money for.
    pub priced: u64,
}

impl Wanted {
    fn made(&self, record: &Record) -> bool {
        record.provider == self.kind.tag() && record.key_id == self.key.as_bytes()
    }

    /// Whether `records` are those of the wanted keys: all of them, and none of another key of a provider that is known here.
    #[must_use]
    pub fn are_all(wanted: &[Self], records: &[Record]) -> bool {
        wanted.iter().all(|key| records.iter().any(|record| key.made(record)))
            && records.iter().all(|record| is_unknown(record) || wanted.iter().any(|key| key.made(record)))
    }

    /// The calls of remote providers that records for all wanted keys take, at best.
    #[must_use]
    pub fn missing(wanted: &[Self], records: &[Record]) -> Missing {
        let mut missing = Missing::default();
        let has = |kind: ProviderKind| records.iter().any(|record| record.provider == kind.tag());
        for key in wanted.iter().filter(|key| !records.iter().any(|record| key.made(record))) {
            if re_encrypts(key.kind) && has(key.kind) {
                missing.rewrap += 1;
                missing.priced += 1;
                continue;
            }
            missing.wrap += u64::from(key.kind.is_remote());
            missing.priced += u64::from(key.kind == ProviderKind::AwsKms);
            if !has(ProviderKind::Local) {
                missing.unwrap = 1;
            }
        }
        if has(ProviderKind::AwsKms) {
            missing.priced += missing.unwrap;
        }
        missing
    }
}

/// Whether a provider brings a data key from one of its keys to another inside.
fn re_encrypts(kind: ProviderKind) -> bool {
    kind == ProviderKind::AwsKms
}

fn next_generation(header: &Header) -> Result<u64, KeyError> {
    let exhausted = header::HeaderError::Malformed("it has the last generation that there is");
    Ok(header.generation.checked_add(1).ok_or(exhausted)?)
}

fn is_unknown(record: &Record) -> bool {
    ProviderKind::from_tag(record.provider).is_none()
}

impl Ring {
    /// Records of the header's data key for all wanted keys, in their order: those that are there, and new ones.
    ///
    /// # Errors
    /// [`KeyError`] if one of them cannot be had.
    pub fn rewrapped(&self, header: &AuthenticHeader, wanted: &[Wanted]) -> Result<Vec<Record>, KeyError> {
        let mut data_key = None;
        let each = wanted.iter().map(|key| {
            let there = header.header.records.iter().find(|record| key.made(record));
            there.map_or_else(|| self.new_record(header, key, &mut data_key), |record| Ok(record.clone()))
        });
        each.collect()
    }

    fn new_record(
        &self,
        header: &AuthenticHeader,
        key: &Wanted,
        data_key: &mut Option<DataKey>,
    ) -> Result<Record, KeyError> {
        let context = EncryptionContext::data_key(&self.volume_id, &header.header.data_key_id);
        if data_key.is_none()
            && let Some(record) = self.re_encrypted(&header.header.records, key, &context)?
        {
            return Ok(record);
        }
        let data_key = match data_key {
            Some(data_key) => data_key,
            None => data_key.insert(self.unwrap_records(header)?.0),
        };
        self.wrapped_for(key, data_key, &context)
    }

    /// A record that the provider made inside; none if it has none to make it of, or may not.
    fn re_encrypted(
        &self,
        records: &[Record],
        key: &Wanted,
        context: &EncryptionContext,
    ) -> Result<Option<Record>, KeyError> {
        let list = self.keys.get();
        let sources = list.recipients.to_unwrap(records).into_iter();
        for (record, source) in
            sources.filter(|(_, source)| re_encrypts(key.kind) && source.recipient().kind == key.kind)
        {
            let from = String::from_utf8_lossy(&record.key_id);
            match source.provider().rewrap(&from, &record.wrapped, &key.key, context) {
                Ok(wrapped) => return Ok(Some(Record::of(key.kind.tag(), wrapped.key_id, wrapped.bytes))),
                Err(error) if may_work_otherwise(error.kind) && records.len() > 1 => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    fn wrapped_for(&self, key: &Wanted, data_key: &DataKey, context: &EncryptionContext) -> Result<Record, KeyError> {
        let list = self.keys.get();
        let target: Option<&Watched> = list.recipients.all().find(|watched| {
            let recipient = watched.recipient();
            recipient.kind == key.kind && recipient.key == key.key
        });
        let target = target.ok_or_else(|| KeyError::NoUsableRecord(format!("{}:{}", key.kind, key.key)))?;
        let wrapped = target.provider().wrap(&key.key, data_key, context)?;
        Ok(Record::of(key.kind.tag(), wrapped.key_id, wrapped.bytes))
    }

    /// The header page of a file with these records in the place of the header's own. The slot that the header is in is left
    /// alone, and the other one has the next generation.
    ///
    /// # Errors
    /// [`KeyError::Header`] if the records do not fit.
    pub fn next_page(
        &self,
        page: &HeaderPage,
        header: &AuthenticHeader,
        records: &[Record],
    ) -> Result<Box<HeaderPage>, KeyError> {
        let old = &header.header;
        let kept = old.records.iter().filter(|record| is_unknown(record));
        let records = records.iter().chain(kept).cloned().collect();
        self.in_other_slot(page, header, &Header { generation: next_generation(old)?, records, ..old.clone() })
    }

    /// Keys and the header page of a file that is to be sealed under a new data key. The file id stays, and so does the slot
    /// that the header is in.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn rekeyed(
        &self,
        page: &HeaderPage,
        header: &AuthenticHeader,
    ) -> Result<(FileKeys, Box<HeaderPage>), KeyError> {
        let (old, minted) = (&header.header, self.new_data_key()?);
        let suite = Suite::from_id(old.suite).ok_or_else(|| KeyError::UnknownSuite(old.suite.to_string()))?;
        let next = Header {
            generation: next_generation(old)?,
            data_key_id: minted.data_key_id,
            commitment: commitment(&minted.data_key, &old.file_id),
            records: minted.records,
            ..old.clone()
        };
        let keys = FileKeys::create(&minted.data_key, suite, &old.file_id);
        Ok((keys, self.in_other_slot(page, header, &next)?))
    }

    fn in_other_slot(
        &self,
        page: &HeaderPage,
        header: &AuthenticHeader,
        next: &Header,
    ) -> Result<Box<HeaderPage>, KeyError> {
        let signed = next.signed_bytes()?;
        let mut page = Box::new(*page);
        header::put_slot(&mut page, 1 - header.slot, &signed, &self.header_key.mac(&signed));
        Ok(page)
    }

    /// The entry of a provisioned key under the first wanted key; none if it is under a wanted one already, or is no key of
    /// this volume.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn rewrapped_provisioned(
        &self,
        name: &str,
        bytes: &[u8],
        wanted: &[Wanted],
    ) -> Result<Option<Vec<u8>>, KeyError> {
        let (Ok(mut entry), Some(first)) = (self.mint.check(name, bytes), wanted.first()) else { return Ok(None) };
        if wanted.iter().any(|key| key.made(&entry.record)) {
            return Ok(None);
        }
        let context = EncryptionContext::data_key(&self.volume_id, &entry.data_key_id);
        let record = self.re_encrypted(std::slice::from_ref(&entry.record), first, &context)?;
        let list = self.keys.get();
        entry.record = match (record, list.recipients.of(&entry.record)) {
            (Some(record), _) => record,
            (None, None) => return Ok(None),
            (None, Some(source)) => {
                let from = String::from_utf8_lossy(&entry.record.key_id);
                let data_key = source.provider().unwrap(&from, &entry.record.wrapped, &context)?;
                self.wrapped_for(first, &data_key, &context)?
            }
        };
        Ok(Some(self.mint.seal(entry)?.1))
    }
}

/// Whether another way to the data key is worth a try.
fn may_work_otherwise(kind: ProviderErrorKind) -> bool {
    matches!(kind, ProviderErrorKind::Denied | ProviderErrorKind::KeyUnusable | ProviderErrorKind::KeyNotFound)
}

/// What a wrapped data key may be longer than the wrapped volume key of the same recipient, in bytes.
const MARGIN: usize = 32;

/// Whether a header holds the records of keys whose names, and what they made of the volume key, have these lengths.
///
/// # Errors
/// [`KeyError::Header`] with the number of bytes.
pub(super) fn check_capacity(lengths: impl Iterator<Item = (usize, usize)>) -> Result<(), KeyError> {
    let needed: usize = lengths.map(|(key, wrapped)| 5 + key + wrapped + MARGIN).sum();
    if needed > header::RECORDS_CAPACITY {
        return Err(header::HeaderError::TooLarge { needed }.into());
    }
    Ok(())
}
