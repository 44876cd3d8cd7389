//! The file of a provisioned key.

use kmsfs::crypto::Suite;
use kmsfs::format::provisioned;

use super::input::Input;
use super::volume::{VOLUME_ID, keys, standing};

/// Bytes: the file; once it parses, it is sealed as our volume's.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let ours = input.flag();
    let file = input.rest();
    let Some(parsed) = provisioned::parse(file) else { return };
    let signed = parsed.content.signed_bytes().expect("it was parsed");
    assert!(provisioned::seal(signed, &parsed.mac) == file, "it parses and is not canonical");
    let ring = &standing(Suite::Xaes256Gcm).ring;
    let name = kmsfs::format::name::provisioned(&parsed.content.data_key_id);
    let key = &keys(Suite::Xaes256Gcm).provision;
    let believed = ring.record_of_provisioned(&name, file);
    assert!(believed.is_none() || key.is_authentic(parsed.signed, &parsed.mac), "a key is believed that nobody sealed");
    let mut sealed = parsed.content.clone();
    if ours {
        sealed.volume_id = VOLUME_ID;
    }
    let signed = sealed.signed_bytes().expect("it was parsed");
    let mac = key.mac(&signed);
    let mut file = provisioned::seal(signed, &mac);
    if let Some(record) = ring.record_of_provisioned(&name, &file) {
        assert!(sealed.volume_id == VOLUME_ID && record == sealed.record);
        assert!(
            ring.record_of_provisioned("00000000000000000000000000000000", &file).is_none()
                || name.bytes().all(|c| c == b'0')
        );
    }
    let last = file.len() - 1;
    file[last] ^= 1;
    assert!(ring.record_of_provisioned(&name, &file).is_none(), "a key that was changed is believed");
}
