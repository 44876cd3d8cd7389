//! One record: its fields, and the line that it is.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, PrimitiveDateTime};

use crate::crypto::AuditKey;
use crate::format::hex;
use crate::keys::KeyUse;

/// Bytes of a line at most, without its end.
pub const MAX_LINE: usize = 16 * 1024;
/// Bytes of a text that others chose.
const MAX_TEXT: usize = 2048;
/// What stands between a record and its MAC.
const MAC_FIELD: &[u8] = b",\"mac\":\"";
const MAC_END: &[u8] = b"\"}";
const MAC_LEN: usize = 64;

/// What a line says. Fields that nothing is known of are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Counts from 1, over all files of a log.
    pub seq: u64,
    /// UTC, RFC 3339.
    pub time: String,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
    /// The SHA-256 of the line before, in hexadecimal; zeros in the first.
    pub prev: String,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// A mount begins.
    Begin {
        /// The volume's id.
        volume: String,
        /// This program's version.
        version: String,
        /// The process behind the mount.
        pid: u32,
        /// Bytes before this line that are no line: what a writer left that did not come to an end.
        #[serde(default, skip_serializing_if = "is_zero")]
        torn: u64,
    },
    /// A wrapping key was used.
    Use(Box<Use>),
    /// Uses that are in no record, since the log could not be written.
    Lost {
        /// How many.
        count: u64,
        /// Why.
        why: String,
    },
    /// The log goes on after a write that failed in the middle.
    Resumed {
        /// Bytes before this line that are no line.
        torn: u64,
    },
    /// A mount ends.
    End {},
}

/// A use of a wrapping key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Use {
    /// What was asked, as AWS KMS calls it.
    pub operation: String,
    /// The wrapping key, `PROVIDER:ID`.
    pub key: String,
    /// The data key's id; without one it is the volume's own key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_key: Option<String>,
    /// The id of the file that it was wanted for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Why, if no program waited for it: `prefetch`, `renewal` or `pool`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The user whose program waited for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// That program's thread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// What the provider called the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// How long it took, in microseconds.
    pub micros: u64,
    /// `ok`, or the kind of failure.
    pub result: String,
    /// What went wrong, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde wants it so
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Use {
    /// What there is to say of a use.
    pub(super) fn of(key_use: &KeyUse) -> Self {
        let behalf = &key_use.behalf;
        let error = key_use.outcome.as_ref().err();
        Self {
            operation: key_use.operation.name().to_owned(),
            key: cut(&format!("{}:{}", key_use.provider, key_use.wrapping_key)),
            data_key: key_use.data_key.clone(),
            file: behalf.file_id.map(|id| hex::encode(&id)),
            reason: behalf.reason.map(|reason| reason.name().to_owned()),
            uid: behalf.caller.map(|(uid, _)| uid),
            pid: behalf.caller.map(|(_, pid)| pid).filter(|pid| *pid != 0),
            request_id: key_use.request_id.as_deref().map(cut),
            micros: u64::try_from(key_use.took.as_micros()).unwrap_or(u64::MAX),
            result: error.map_or("ok", |error| error.kind.name()).to_owned(),
            error: error.map(|error| cut(&error.message)),
        }
    }
}

/// A text of bounded length.
fn cut(text: &str) -> String {
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..end].to_owned()
}

/// A line as it is on disk, without its end.
pub struct Line<'l> {
    whole: &'l [u8],
    signed: &'l [u8],
    mac: [u8; 32],
    /// What it says.
    pub record: Record,
}

impl<'l> Line<'l> {
    /// The line of `bytes`, if it is one.
    #[must_use]
    pub fn parse(bytes: &'l [u8]) -> Option<Self> {
        let signed_len = bytes.len().checked_sub(MAC_FIELD.len() + MAC_LEN + MAC_END.len())?;
        if bytes.len() > MAX_LINE {
            return None;
        }
        let (signed, rest) = bytes.split_at(signed_len);
        let mac = rest.strip_prefix(MAC_FIELD)?.strip_suffix(MAC_END)?;
        let mac = hex::decode(std::str::from_utf8(mac).ok()?)?;
        let closed = [signed, b"}"].concat();
        let record = serde_json::from_slice(&closed).ok()?;
        Some(Self { whole: bytes, signed, mac, record })
    }

    /// Whether this volume's key made it.
    #[must_use]
    pub fn is_authentic(&self, key: &AuditKey) -> bool {
        key.is_authentic(self.signed, &self.mac)
    }

    /// What the next line says of this one.
    #[must_use]
    pub fn link(&self) -> String {
        hex::encode(&AuditKey::link(self.whole))
    }
}

/// The end of a chain: what the next record has to say of the one before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// The number of the last record.
    pub(super) seq: u64,
    /// The hash of its line.
    pub(super) link: String,
}

impl Head {
    /// Before the first record.
    pub(super) fn start() -> Self {
        Self { seq: 0, link: hex::encode(&[0; 32]) }
    }

    /// The next line, with its end; the chain goes on after it.
    pub(super) fn seal(&mut self, time: SystemTime, event: Event, key: &AuditKey) -> Vec<u8> {
        let record = Record { seq: self.seq + 1, time: time_text(time), event, prev: self.link.clone() };
        // Fields of texts and numbers always become JSON.
        let mut line = serde_json::to_vec(&record).unwrap_or_default();
        line.pop();
        let mac = hex::encode(&key.mac(&line));
        line.extend_from_slice(MAC_FIELD);
        line.extend_from_slice(mac.as_bytes());
        line.extend_from_slice(MAC_END);
        *self = Self { seq: record.seq, link: hex::encode(&AuditKey::link(&line)) };
        line.push(b'\n');
        line
    }
}

/// A moment as RFC 3339 writes it, in UTC, to the microsecond.
#[must_use]
pub fn time_text(time: SystemTime) -> String {
    let age = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
    let utc = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(PrimitiveDateTime::MAX.assume_utc());
    let (date, time, micros) = (utc.date(), utc.time(), age.subsec_micros());
    let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
    let (hour, minute, second) = time.as_hms();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{Secret, Suite, VolumeKeys};

    #[test]
    fn times_are_those_of_date() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_827_696, "2000-02-29T12:34:56.000000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000Z"),
            (1_735_689_600, "2025-01-01T00:00:00.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
            (253_402_300_799, "9999-12-31T23:59:59.000000Z"),
            (253_402_300_800, "9999-12-31T23:59:59.000000Z"),
        ] {
            assert_eq!(time_text(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn lines_round_trip_and_a_changed_one_does_not_authenticate() {
        let key = VolumeKeys::derive(&Secret::random(), &[1; 16], Suite::Xaes256Gcm).audit;
        let mut head = Head::start();
        let lost = Event::Lost { count: 3, why: "a \"text\"\n\u{1b}[2J, \"mac\":\"".to_owned() };
        let mut line = head.seal(SystemTime::now(), lost.clone(), &key);
        assert_eq!(line.pop(), Some(b'\n'));
        let parsed = Line::parse(&line).unwrap();
        assert!(parsed.is_authentic(&key) && parsed.record.event == lost);
        assert_eq!((parsed.record.seq, parsed.link()), (1, head.link.clone()));
        assert!(!line.contains(&0x1b) && !line.contains(&b'\n'));
        for at in 0..line.len() {
            let mut changed = line.clone();
            changed[at] ^= 1;
            assert!(!Line::parse(&changed).is_some_and(|line| line.is_authentic(&key)), "byte {at}");
        }
        assert!(Line::parse(&line[..line.len() - 1]).is_none());
    }
}
