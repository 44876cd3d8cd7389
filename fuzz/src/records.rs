//! Headers that a holder of the volume key could have made: any records, any wrapped keys, a true or a false commitment. Only keys
//! on the list are asked for, and only the key that the header commits to is believed. Then the header is rewritten, and the
//! write is torn in any way between sectors.

use kmsfs::crypto::{DataKey, FileKeys, Suite, commitment};
use kmsfs::format::geometry::PAGE_LEN;
use kmsfs::format::header::{self, Header, HeaderPage, RECORDS_CAPACITY, Record};
use kmsfs::keys::{ProviderKind, Ring};

use super::input::Input;
use super::volume::{GOOD, LISTED, OTHER, VOLUME_ID, data_key, fresh, keys, other_key};

const SECTOR: usize = 512;

/// Bytes: the fields of a header, records, records of its rewriting, and which sectors of that arrive.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let volume = fresh(Suite::Xaes256Gcm);
    let file_id = [input.byte(); 32];
    let committed = match input.byte() % 4 {
        0 | 1 => commitment(&data_key(), &file_id),
        2 => commitment(&other_key(), &file_id),
        _ => input.array(),
    };
    let header = Header {
        suite: input.byte() % 4,
        generation: if input.flag() { u64::MAX - u64::from(input.byte() & 1) } else { input.number() },
        volume_id: VOLUME_ID,
        file_id,
        data_key_id: input.array(),
        records: records(&mut input),
        commitment: committed,
    };
    let Some(signed) = encoded(&header) else { return };
    let slot = usize::from(input.flag());
    let mut page = [0; PAGE_LEN];
    header::put_slot(&mut page, slot, &signed, &keys(Suite::Xaes256Gcm).header.mac(&signed));
    let Some(suite) = Suite::from_id(header.suite) else {
        assert!(volume.ring.authenticate(&page).is_err(), "a suite that does not exist");
        return;
    };
    let found = volume.ring.authenticate(&page).expect("it is sealed").expect("it is there");
    assert!(*found.header() == header, "it says something else");
    let expected = expected(&header);
    match (volume.ring.open(&found), &expected) {
        (Ok(opened), Some(key)) => {
            assert!(probe(&opened.keys) == probe(&FileKeys::create(key, suite, &file_id)), "the keys of another file");
        }
        (Err(_), None) => {}
        (Ok(_), None) => panic!("a key is believed that the header does not commit to"),
        (Err(error), Some(_)) => panic!("the right key is there and not found: {error}"),
    }
    rewrite(&volume.ring, &page, &header, &mut input);
}

fn records(input: &mut Input<'_>) -> Vec<Record> {
    let record = |input: &mut Input<'_>| {
        let provider = match input.byte() % 4 {
            0 | 1 => ProviderKind::Local.tag(),
            2 => ProviderKind::AwsKms.tag(),
            _ => input.byte(),
        };
        let key_id = match input.byte() % 4 {
            0 | 1 => LISTED[0].into(),
            2 => LISTED[1].into(),
            _ => input.field(80).to_vec(),
        };
        let wrapped = match input.byte() % 4 {
            0 => vec![GOOD; 60],
            1 => vec![OTHER; 60],
            2 => input.field(200).to_vec(),
            _ => vec![input.byte(); input.below(2000)],
        };
        Record { provider, key_id, wrapped }
    };
    let count = match input.byte() {
        255 => 256,
        few => usize::from(few) % 5,
    };
    (0..count).map(|_| record(input)).collect()
}

/// The bytes of a header that has an encoding; whether it has one is known.
fn encoded(header: &Header) -> Option<Vec<u8>> {
    let needed: usize = header.records.iter().map(|record| 5 + record.key_id.len() + record.wrapped.len()).sum();
    let fits = needed <= RECORDS_CAPACITY && (1..=255).contains(&header.records.len());
    let signed = header.signed_bytes();
    assert_eq!(signed.is_ok(), fits, "{signed:?}");
    signed.ok()
}

/// The key that opening must give: that of a record on the list which the header commits to.
fn expected(header: &Header) -> Option<DataKey> {
    let listed = |record: &&Record| {
        record.provider == ProviderKind::Local.tag() && LISTED.iter().any(|key| key.as_bytes() == record.key_id)
    };
    let key_in = |record: &Record| match record.wrapped.first() {
        Some(&GOOD) => Some(data_key()),
        Some(&OTHER) => Some(other_key()),
        _ => None,
    };
    let keys = header.records.iter().filter(listed).filter_map(key_in);
    keys.into_iter().find(|key| commitment(key, &header.file_id) == header.commitment)
}

fn probe(keys: &FileKeys) -> [u8; 16] {
    keys.session().seal(&[0; 24], b"", b"probe", &mut [0; 5])
}

/// A power cut while a header is rewritten leaves the old one or the new one, wherever the write is torn, and in whichever order
/// its sectors arrive.
fn rewrite(ring: &Ring, page: &HeaderPage, old: &Header, input: &mut Input<'_>) {
    let found = ring.authenticate(page).expect("it is sealed").expect("it is there");
    let new_records = records(input);
    let Ok(next) = ring.next_page(page, &found, &new_records) else { return };
    let new = ring.authenticate(&next).expect("it is sealed").expect("it is there");
    assert_eq!(new.header().generation, old.generation + 1);
    assert!(Header { records: old.records.clone(), generation: old.generation, ..new.header().clone() } == *old);
    let kept = old.records.iter().filter(|record| ProviderKind::from_tag(record.provider).is_none());
    let expected: Vec<Record> = new_records.iter().chain(kept).cloned().collect();
    assert!(new.header().records == expected, "records are lost");
    let arrived = input.byte();
    let mut torn = *page;
    for sector in (0..PAGE_LEN / SECTOR).filter(|sector| arrived >> sector & 1 == 1) {
        let range = sector * SECTOR..(sector + 1) * SECTOR;
        torn[range.clone()].copy_from_slice(&next[range]);
    }
    let left = ring.authenticate(&torn).expect("one of them is whole").expect("one of them is there");
    assert!(left.header() == old || left.header() == new.header(), "neither the old header nor the new one");
}
