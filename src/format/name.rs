//! Names in a cipher directory: how encrypted names, long names, directory ids and link targets are spelled.
//! `docs/FORMAT.md` section 7.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::hex;

/// The symlink in each directory whose target is the directory's id.
pub const DIRECTORY_ID: &str = ".kmsfs.dir";
/// The directory of the volume's own files, in the root.
pub const VOLUME_DIR: &str = ".kmsfs";
/// The directory of provisioned keys, in that one.
pub const PROVISIONED_DIR: &str = "keys";
/// The file in the volume's own directory that its users lock.
pub const LOCK_FILE: &str = "lock";
/// The file in it that says who writes the volume.
pub const LEASE_FILE: &str = "lease";
/// The longest plain name in bytes.
pub const NAME_MAX: usize = 255;
/// The longest entry a backing filesystem takes.
const ENTRY_MAX: usize = 255;
/// The longest plain symlink target, in bytes, whose sealed form any backing symlink takes.
pub const LINK_TARGET_MAX: usize = 4095 * 3 / 4 - 40;

/// The directory of long symlink targets, in the volume's own.
pub const LONG_TARGETS_DIR: &str = "links";
/// The directory of redo logs, in the volume's own.
pub const REDO_LOGS_DIR: &str = "rekey";
/// What release 0.1.0 noted in that directory: a list of files, which nothing believes.
pub const REKEYED: &str = "done";
/// A path, and so a symlink target, is shorter than this.
pub const PATH_MAX: usize = 4096;

/// The name of a redo log: which file it is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedoLog {
    /// The inode number of the backing file.
    pub ino: u64,
    /// The file id in its header.
    pub file_id: [u8; 32],
}

impl RedoLog {
    /// The inode number, `-`, and the file id in hexadecimal.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{}-{}", self.ino, super::hex::encode(&self.file_id))
    }

    /// What `text` names, if it is the name of a log.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (ino, id) = text.split_once('-')?;
        let log = Self { ino: ino.parse().ok()?, file_id: super::hex::decode(id)? };
        (log.text() == text).then_some(log)
    }
}

/// What a backing symlink says whose target is too long for it: where the sealed target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongTarget {
    /// Names the file.
    pub id: [u8; 16],
    /// Bytes of the plain target.
    pub len: u16,
}

impl LongTarget {
    /// Length of the text; no sealed target is so short.
    pub const TEXT_LEN: u64 = 25;

    /// `~` and the base64 of id and length.
    #[must_use]
    pub fn text(&self) -> String {
        format!("~{}", encode(&[&self.id[..], &self.len.to_le_bytes()].concat()))
    }

    /// The name of the file: the id in lower-case hexadecimal.
    #[must_use]
    pub fn file(&self) -> String {
        super::hex::encode(&self.id)
    }

    /// Whether a file can have this name.
    #[must_use]
    pub fn is_file(name: &str) -> bool {
        name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    }

    /// What `text` names, if it names anything.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let bytes = decode(text.strip_prefix(b"~")?)?;
        let (id, len) = bytes.split_first_chunk::<16>()?;
        Some(Self { id: *id, len: u16::from_le_bytes(len.try_into().ok()?) })
    }
}

/// How an encrypted name is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    /// The entry's name is the encrypted name.
    Short(String),
    /// The entry's name is a digest of the encrypted name, which is kept as the target of a symlink beside it.
    Long {
        /// The entry's name: `~` and the digest.
        entry: String,
        /// The name of the symlink: the entry's name and `.n`.
        link: String,
        /// The target of the symlink: the encrypted name.
        target: String,
    },
}

impl Stored {
    /// The spelling of the encrypted name `sealed`. `digest` is the SHA-256 of the text it is given.
    #[must_use]
    pub fn new(sealed: &[u8], digest: impl FnOnce(&[u8]) -> [u8; 32]) -> Self {
        let text = URL_SAFE_NO_PAD.encode(sealed);
        if text.len() <= ENTRY_MAX {
            return Self::Short(text);
        }
        let entry = format!("~{}", URL_SAFE_NO_PAD.encode(digest(text.as_bytes())));
        Self::Long { link: link_of(&entry), entry, target: text }
    }

    /// The name of the directory entry.
    #[must_use]
    pub fn entry(&self) -> &str {
        match self {
            Self::Short(entry) | Self::Long { entry, .. } => entry,
        }
    }
}

/// The entry of the provisioned key with this data key id.
#[must_use]
pub fn provisioned(data_key_id: &[u8; 16]) -> String {
    hex::encode(data_key_id)
}

/// Whether an entry can be that of a provisioned key, by its name alone.
#[must_use]
pub fn is_provisioned(entry: &str) -> bool {
    hex::decode::<16>(entry).is_some()
}

/// What an entry of a cipher directory is, by its name alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<'e> {
    /// `.`, `..`, a directory id, or the volume's own directory.
    Ours,
    /// The symlink of a long name.
    LongNameLink,
    /// The entry of a long name; its encrypted name is the target of [`link_of`] it.
    Long(&'e str),
    /// An encrypted name.
    Short(&'e str),
}

/// Sorts an entry by its name.
#[must_use]
pub fn classify(entry: &str) -> Entry<'_> {
    match entry.as_bytes().first() {
        Some(b'.') => Entry::Ours,
        Some(b'~') if entry.ends_with(".n") => Entry::LongNameLink,
        Some(b'~') => Entry::Long(entry),
        _ => Entry::Short(entry),
    }
}

/// The symlink that belongs to the long-name entry `entry`.
#[must_use]
pub fn link_of(entry: &str) -> String {
    format!("{entry}.n")
}

/// Whether a decrypted name can be an entry's name. Only a holder of the key can make one that cannot.
#[must_use]
pub fn is_valid(plain: &[u8]) -> bool {
    (1..=NAME_MAX).contains(&plain.len())
        && plain != b"."
        && plain != b".."
        && !plain.contains(&b'/')
        && !plain.contains(&0)
}

/// Base64url without padding.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The bytes of canonical base64url without padding.
#[must_use]
pub fn decode(text: &[u8]) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_stay_and_long_names_get_a_link() {
        let digest = |_: &[u8]| [0; 32];
        assert_eq!(Stored::new(&[0; 191], digest), Stored::Short("A".repeat(255)));
        let Stored::Long { entry, link, target } = Stored::new(&[0; 192], digest) else { panic!("long") };
        assert_eq!(entry, format!("~{}", "A".repeat(43)));
        assert_eq!((link, target), (format!("{entry}.n"), "A".repeat(256)));
    }

    #[test]
    fn entries_are_told_apart() {
        for ours in [".", "..", DIRECTORY_ID, VOLUME_DIR] {
            assert_eq!(classify(ours), Entry::Ours);
        }
        assert_eq!(classify("~abc"), Entry::Long("~abc"));
        assert_eq!(classify("~abc.n"), Entry::LongNameLink);
        assert_eq!(classify("-abc"), Entry::Short("-abc"));
    }

    #[test]
    fn names_that_no_entry_can_have_are_told() {
        assert!(is_valid(b"...") && is_valid(&[b'a'; 255]));
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'a'; 256]] {
            assert!(!is_valid(bad), "{bad:?}");
        }
    }

    #[test]
    fn long_targets_are_named_by_a_text_of_one_length() {
        let long = LongTarget { id: [7; 16], len: 4095 };
        assert_eq!(long.text().len() as u64, LongTarget::TEXT_LEN);
        assert_eq!(LongTarget::parse(long.text().as_bytes()), Some(long));
        for bad in [&b""[..], b"~", b"~AAAA", &long.text().as_bytes()[1..]] {
            assert_eq!(LongTarget::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn base64_is_canonical() {
        assert_eq!(decode(encode(&[1, 2, 255]).as_bytes()), Some(vec![1, 2, 255]));
        for bad in ["AQL_=", "AQL/", "AQ=", "AR", "A"] {
            assert_eq!(decode(bad.as_bytes()), None, "{bad}");
        }
    }
}
