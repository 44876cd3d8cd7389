//! The extended attributes of a file or directory.

use std::io;

use crate::crypto::NameKey;
use crate::format::xattr::{self, StoredName, StoredXattr};
use crate::keys::Volume;
use crate::storage::Node;

use super::finding::{Found, Kind, Place, Severity};

/// What the names of encrypted attributes begin with.
const OURS: &[u8] = b"user.kmsfs.";

/// The encrypted attributes of a file that has no header, which they were bound to: a crash leaves this of a file that nobody had
/// synced.
pub(super) fn check_lost(node: &Node, place: &Place, found: &mut Found) {
    let lost = ours(node, place, found).len();
    if lost > 0 {
        let what =
            format!("{lost} extended attributes are bound to a header that never became durable: nobody reads them");
        found.add(place, Severity::Amiss, Kind::Leftover, what);
    }
}

/// The names of encrypted attributes.
fn ours(node: &Node, place: &Place, found: &mut Found) -> Vec<Vec<u8>> {
    let names = match node.xattr_names() {
        Ok(names) => names,
        Err(error) if is_nothing(&error) => return Vec::new(),
        Err(error) => {
            found.io(place, &error);
            return Vec::new();
        }
    };
    names.split(|byte| *byte == 0).filter(|name| name.starts_with(OURS)).map(<[u8]>::to_vec).collect()
}

/// Checks the encrypted attributes of `node`, which are bound to `owner`.
pub(super) fn check(volume: &Volume, node: &Node, owner: &[u8], place: &Place, found: &mut Found) {
    for stored in &ours(node, place, found) {
        match check_one(volume, node, owner, stored) {
            Ok(None) => {}
            Ok(Some(what)) => found.add(place, Severity::Damage, Kind::Xattr, what),
            // It was removed meanwhile.
            Err(error) if is_nothing(&error) => {}
            Err(error) => found.io(place, &error),
        }
    }
}

/// What is wrong with an attribute, if anything is.
fn check_one(volume: &Volume, node: &Node, owner: &[u8], stored: &[u8]) -> io::Result<Option<String>> {
    let shown = String::from_utf8_lossy(stored);
    let unreadable = || {
        Ok(Some(format!("the name of the extended attribute {shown} does not decrypt: it was changed or copied here")))
    };
    let value = node.xattr(stored)?;
    let sealed = match xattr::classify(stored) {
        Some(StoredName::Sealed(sealed)) => sealed,
        Some(StoredName::InValue) => match xattr::sealed_name_in(&value) {
            Some(sealed) => sealed.to_vec(),
            None => return unreadable(),
        },
        None => return unreadable(),
    };
    let spelled = StoredXattr::new(&sealed, NameKey::digest);
    if spelled.name.as_bytes() != stored {
        return unreadable();
    }
    let Ok(name) = volume.xattrs.open_name(owner, &sealed) else { return unreadable() };
    if spelled.value(&value).is_some_and(|value| volume.xattrs.open_value(owner, &sealed, value).is_ok()) {
        return Ok(None);
    }
    let name = String::from_utf8_lossy(&name);
    Ok(Some(format!("the value of the extended attribute user.{name} does not authenticate: it was changed")))
}

/// The filesystem has no attributes, or this one is gone.
fn is_nothing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported || error.raw_os_error() == Some(libc::ENODATA)
}
