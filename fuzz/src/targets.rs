//! Targets of symlinks, short and long.

use kmsfs::crypto::LinkKey;
use kmsfs::format::geometry::plain_len_of_base64;
use kmsfs::format::name::{self, LINK_TARGET_MAX, LongTarget, PATH_MAX};

use super::input::Input;
use super::volume::{keys, suite, unused_keys};

/// Bytes: the suite, how a target is damaged, and a plain target; all of them are a sealed target too.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let suite = suite(input.flag());
    let (key, unused) = (&keys(suite).link, &unused_keys(suite).link);
    let mut damage = Input::new(input.take(22));
    for sealed in [Some(data.to_vec()), name::decode(data)].into_iter().flatten() {
        assert!(
            unused.open(&sealed).is_err() && unused.open_long(&[3; 16], &sealed).is_err(),
            "a target is believed that nobody sealed"
        );
    }
    let plain = input.rest();
    if plain.len() <= LINK_TARGET_MAX {
        short(key, plain, &mut damage);
    }
    if plain.len() < PATH_MAX {
        long(key, plain, &mut damage);
    }
}

/// In the backing symlink.
fn short(key: &LinkKey, plain: &[u8], damage: &mut Input<'_>) {
    let text = name::encode(&key.seal(plain));
    assert!(text.len() < PATH_MAX, "no filesystem takes this target");
    assert_eq!(
        plain_len_of_base64(text.len() as u64, LinkKey::OVERHEAD),
        plain.len() as u64,
        "the size that stat shows"
    );
    assert!(text.len() as u64 > LongTarget::TEXT_LEN && LongTarget::parse(text.as_bytes()).is_none());
    let opened = |text: &[u8]| name::decode(text).and_then(|sealed| key.open(&sealed).ok());
    assert!(opened(text.as_bytes()).as_deref() == Some(plain), "a target is lost");
    let mut other = text.into_bytes();
    if damage.damage(&mut other) {
        assert!(opened(&other).is_none(), "a target that was changed is believed");
    }
}

/// In a file that the backing symlink names.
fn long(key: &LinkKey, plain: &[u8], damage: &mut Input<'_>) {
    let id = [5; 16];
    let sealed = key.seal_long(&id, plain);
    assert!(key.open_long(&id, &sealed).as_deref() == Ok(plain), "a long target is lost");
    assert!(key.open(&sealed).is_err() && key.open_long(&[6; 16], &sealed).is_err(), "a target of another link");
    let mut other = sealed;
    if damage.damage(&mut other) {
        assert!(key.open_long(&id, &other).is_err(), "a long target that was changed is believed");
    }
    let len = u16::try_from(plain.len()).expect("shorter than a path");
    let mut text = LongTarget { id, len }.text().into_bytes();
    assert!(LongTarget::parse(&text) == Some(LongTarget { id, len }));
    if damage.damage(&mut text)
        && let Some(other) = LongTarget::parse(&text)
    {
        assert!(other != LongTarget { id, len }, "two spellings of one long target");
    }
}
