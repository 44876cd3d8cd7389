//! A header page of any bytes: strict parsing, no belief without a MAC, and, once its slots are sealed, the right one of two.

use kmsfs::crypto::Suite;
use kmsfs::format::geometry::PAGE_LEN;
use kmsfs::format::header::{self, HeaderPage, SLOT_LEN};

use super::input::Input;
use super::volume::{VOLUME_ID, keys, standing};

/// Bytes: what is sealed, how many belong to slot A, those, and those of slot B.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let sealed = input.byte();
    let mut page = [0; PAGE_LEN];
    for slot in 0..2 {
        let bytes = if slot == 0 { input.field(SLOT_LEN) } else { input.take(SLOT_LEN) };
        page[slot * SLOT_LEN..][..bytes.len()].copy_from_slice(bytes);
    }
    is_strict(&page);
    let ring = &standing(Suite::Xaes256Gcm).ring;
    match ring.authenticate(&page) {
        Ok(Some(header)) => {
            assert!(is_ours(&page, header.header().generation), "a slot is believed that nobody sealed")
        }
        Ok(None) => assert_eq!(page, [0; PAGE_LEN], "a page that is not empty is taken for none"),
        Err(_) => {}
    }
    let mut best = None;
    for slot in 0..2 {
        if sealed >> slot & 1 == 1
            && let Some((generation, good)) = seal(&mut page, slot, sealed >> (slot + 2) & 1 == 0)
            && good
            && best.is_none_or(|(_, highest)| generation > highest)
        {
            best = Some((slot, generation));
        }
    }
    let found = ring.authenticate(&page);
    let unsealed = sealed & 3 != 3;
    match best {
        Some((slot, generation)) => {
            let found = found.expect("a sealed slot is there").expect("a sealed slot is there");
            // A slot of the corpus may have been sealed before.
            assert!(unsealed || found.header().generation == generation, "not slot {slot}");
            assert!(found.header().generation >= generation);
        }
        None => assert!(unsealed || !matches!(found, Ok(Some(_))), "a slot is believed that is not this volume's"),
    }
}

/// What parses is encoded again to the same bytes.
fn is_strict(page: &HeaderPage) {
    for (at, slot) in header::parse_page(page).into_iter().enumerate() {
        let Ok(slot) = slot else { continue };
        let mut again = *page;
        header::put_slot(&mut again, at, &slot.header.signed_bytes().expect("it was parsed"), &slot.mac);
        assert!(again == *page, "slot {at} parses and is not canonical");
    }
}

/// Whether a slot with this generation has the MAC that we make.
fn is_ours(page: &HeaderPage, generation: u64) -> bool {
    let slots = header::parse_page(page);
    let key = &keys(Suite::Xaes256Gcm).header;
    slots.iter().flatten().any(|slot| slot.header.generation == generation && key.mac(slot.signed) == slot.mac)
}

/// Seals a slot if it parses, as one of our volume or of whichever it says. Returns its generation, and whether it is to be
/// believed.
fn seal(page: &mut HeaderPage, at: usize, ours: bool) -> Option<(u64, bool)> {
    let mut header = header::parse_page(page)[at].as_ref().ok()?.header.clone();
    if ours {
        header.volume_id = VOLUME_ID;
    }
    let signed = header.signed_bytes().expect("it was parsed");
    header::put_slot(page, at, &signed, &keys(Suite::Xaes256Gcm).header.mac(&signed));
    Some((header.generation, header.volume_id == VOLUME_ID && Suite::from_id(header.suite).is_some()))
}
