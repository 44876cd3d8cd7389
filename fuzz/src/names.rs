//! Names of entries, directory ids, and names of the volume's own files.

use kmsfs::crypto::{NameKey, Suite};
use kmsfs::format::name::{self, Entry, LongTarget, Stored};

use super::input::Input;
use super::volume::keys;

const HERE: [u8; 16] = [1; 16];
const ELSEWHERE: [u8; 16] = [2; 16];

/// Bytes: how an entry is damaged, and a plain name; all of them are an entry's name too.
pub fn run(data: &[u8]) {
    let key = &keys(Suite::Xaes256Gcm).name;
    any_entry(key, data);
    let mut input = Input::new(data);
    let mut damaged_places = Input::new(input.take(11));
    sealed(key, input.rest(), &mut damaged_places);
}

/// Bytes as a backing directory shows them.
fn any_entry(key: &NameKey, bytes: &[u8]) {
    if let Some(sealed) = name::decode(bytes) {
        assert!(name::encode(&sealed).as_bytes() == bytes, "two spellings of one name");
        if let Ok(plain) = key.open(&HERE, &sealed) {
            assert!(key.seal(&HERE, &plain) == sealed, "a name is believed that nobody sealed");
        }
        if let Ok(signed) = <[u8; 32]>::try_from(sealed.as_slice()) {
            assert!(key.directory_id(&signed).is_err(), "a directory id is believed that nobody made");
        }
    }
    if let Some(long) = LongTarget::parse(bytes) {
        assert!(long.text().as_bytes() == bytes, "two spellings of one long target");
        assert!(LongTarget::is_file(&long.file()) && name::decode(bytes).is_none());
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match name::classify(text) {
        Entry::Short(entry) | Entry::Long(entry) => assert_eq!(entry, text),
        Entry::Ours => assert!(name::decode(bytes).is_none(), "one of ours is a name"),
        Entry::LongNameLink => assert!(text.starts_with('~')),
    }
    if name::is_provisioned(text) {
        assert!(matches!(name::classify(text), Entry::Short(_)) && text.len() == 32);
    }
}

/// A name that a holder of the key made, and the same with other characters in it.
fn sealed(key: &NameKey, plain: &[u8], damage: &mut Input<'_>) {
    let ciphertext = key.seal(&HERE, plain);
    assert!(key.open(&HERE, &ciphertext).as_deref() == Ok(plain), "a name is lost");
    assert!(key.open(&ELSEWHERE, &ciphertext).is_err(), "a name of another directory is believed");
    let stored = Stored::new(&ciphertext, NameKey::digest);
    if name::is_valid(plain) {
        assert!(stored.entry().len() <= 255, "no filesystem takes this entry");
    }
    let text = match &stored {
        Stored::Short(entry) => {
            assert_eq!(name::classify(entry), Entry::Short(entry));
            entry
        }
        Stored::Long { entry, link, target } => {
            assert_eq!(name::classify(entry), Entry::Long(entry));
            assert_eq!(name::classify(link), Entry::LongNameLink);
            assert_eq!(*link, name::link_of(entry));
            target
        }
    };
    assert_eq!(name::decode(text.as_bytes()).as_ref(), Some(&ciphertext));
    let mut other = text.clone().into_bytes();
    if damage.damage(&mut other) {
        let opened = name::decode(&other).and_then(|sealed| key.open(&HERE, &sealed).ok());
        assert!(opened.is_none(), "a name that was changed is believed");
        // The entry of a long name is a digest of it.
        let stored_again = name::decode(&other).map(|sealed| Stored::new(&sealed, NameKey::digest));
        assert!(stored_again.is_none_or(|again| again.entry() != stored.entry()), "two names have one entry");
    }
}
