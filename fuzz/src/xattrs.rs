//! Extended attributes: names that are spelled out, names that go with the value, and values.

use kmsfs::crypto::{NameKey, XattrKey};
use kmsfs::format::xattr::{self, StoredName, StoredXattr};

use super::input::Input;
use super::volume::{keys, suite};

const OWNER: [u8; 32] = [1; 32];
const OTHER: [u8; 16] = [2; 16];

/// Bytes: the suite, how the stored things are damaged, a name, a value; all of them are a stored name and a stored value too.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let key = &keys(suite(input.flag())).xattr;
    let mut damage = Input::new(input.take(22));
    any_stored(key, data);
    let name = input.field(255);
    let value = input.rest();
    let sealed_name = key.seal_name(&OWNER, name);
    assert!(key.open_name(&OWNER, &sealed_name).as_deref() == Ok(name), "a name is lost");
    assert!(key.open_name(&OTHER, &sealed_name).is_err(), "a name of another owner is believed");
    let stored = StoredXattr::new(&sealed_name, NameKey::digest);
    assert!(stored.name.len() <= 255, "no filesystem takes this name");
    let sealed = [&stored.lead[..], &key.seal_value(&OWNER, &sealed_name, value)].concat();
    let read = |stored_value: &[u8]| {
        let sealed = stored.value(stored_value)?;
        key.open_value(&OWNER, &sealed_name, sealed).ok()
    };
    assert!(read(&sealed).as_deref() == Some(value), "a value is lost");
    assert!(listed(key, &stored.name, &sealed).as_deref() == Some(name), "a name is not listed");
    let mut other_value = sealed.clone();
    if damage.damage(&mut other_value) {
        assert!(read(&other_value).is_none(), "a value that was changed is believed");
        let shown = listed(key, &stored.name, &other_value);
        assert!(shown.is_none_or(|shown| shown == name), "a name that nobody set is listed");
    }
    let mut other_name = stored.name.clone().into_bytes();
    if damage.damage(&mut other_name)
        && let Ok(other_name) = String::from_utf8(other_name)
    {
        assert!(listed(key, &other_name, &sealed).is_none(), "a name that was changed is listed");
    }
}

/// What a backing file may have that nobody of ours wrote.
fn any_stored(key: &XattrKey, bytes: &[u8]) {
    if let Some(StoredName::Sealed(sealed)) = xattr::classify(bytes) {
        let stored = StoredXattr::new(&sealed, NameKey::digest);
        assert!(bytes.len() > 255 || stored.name.as_bytes() == bytes, "two spellings of one attribute");
        if let Ok(plain) = key.open_name(&OWNER, &sealed) {
            assert!(key.seal_name(&OWNER, &plain) == sealed, "a name is believed that nobody sealed");
        }
    }
    if let Some(sealed) = xattr::sealed_name_in(bytes) {
        assert!(sealed.len() + 2 <= bytes.len());
    }
    assert!(key.open_value(&OWNER, b"", bytes).is_err(), "a value is believed that nobody sealed");
}

/// The name that listing shows for a stored attribute.
fn listed(key: &XattrKey, name: &str, value: &[u8]) -> Option<Vec<u8>> {
    match xattr::classify(name.as_bytes())? {
        StoredName::Sealed(sealed) => key.open_name(&OWNER, &sealed).ok(),
        StoredName::InValue => {
            let sealed = xattr::sealed_name_in(value)?;
            let own = StoredXattr::new(sealed, NameKey::digest).name == name;
            own.then(|| key.open_name(&OWNER, sealed).ok()).flatten()
        }
    }
}
