//! What single steps cost: `cargo bench`. Kept so that a step that becomes slower is seen apart from disks and kernels.
#![allow(clippy::unwrap_used)] // a benchmark may end that way

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use kmsfs::content::open_page;
use kmsfs::crypto::{DataKey, FileKeys, Suite, VolumeKeys};
use kmsfs::format::config::{self, End, Holes};
use kmsfs::format::geometry::{PAGE_LEN, PAYLOAD_LEN, PageIndex};
use kmsfs::format::header::{self, HeaderPage};
use kmsfs::format::page::{self, Page, Trailer, part};
use kmsfs::keys::providers::scripted::ScriptedProvider;
use kmsfs::keys::volume::{self, NewVolume};
use kmsfs::keys::{KeyLimits, Volume};

const SUITES: [Suite; 2] = [Suite::Xaes256Gcm, Suite::XChaCha20Poly1305];

fn main() {
    divan::main();
}

fn keys(suite: Suite) -> FileKeys {
    FileKeys::create(&DataKey::random(), suite, &[1; 32])
}

fn seal(keys: &FileKeys, plain: &[u8; PAYLOAD_LEN], disk: &mut Page) {
    let (index, trailer) = (PageIndex(7), Trailer::INNER.encode());
    let nonce = page::nonce(&[5; 24], 0);
    let tag = keys.session().seal(&nonce, &page::associated_data(index, trailer), plain, &mut disk[part::CIPHERTEXT]);
    disk[part::NONCE].copy_from_slice(&nonce);
    disk[part::TRAILER].copy_from_slice(&trailer);
    disk[part::TAG].copy_from_slice(&tag);
}

#[divan::bench(args = SUITES.map(Suite::name))]
fn page_seal(bencher: Bencher<'_, '_>, suite: &str) {
    let keys = keys(Suite::from_name(suite).unwrap());
    let (plain, mut disk) = ([7; PAYLOAD_LEN], [0; PAGE_LEN]);
    bencher.counter(BytesCount::new(PAYLOAD_LEN)).bench_local(|| seal(&keys, black_box(&plain), &mut disk));
}

#[divan::bench(args = SUITES.map(Suite::name))]
fn page_open(bencher: Bencher<'_, '_>, suite: &str) {
    let keys = keys(Suite::from_name(suite).unwrap());
    let (mut plain, mut disk) = ([7; PAYLOAD_LEN], [0; PAGE_LEN]);
    seal(&keys, &plain, &mut disk);
    let mut session = keys.session();
    bencher
        .counter(BytesCount::new(PAYLOAD_LEN))
        .bench_local(|| open_page(&mut session, PageIndex(7), black_box(&disk), &mut plain).unwrap());
}

fn made() -> (Volume, Box<HeaderPage>) {
    let settings =
        NewVolume { suite: Suite::Xaes256Gcm, holes: Holes::Allow, end: End::Lenient, files_per_data_key: 1 };
    let provider = Arc::new(ScriptedProvider::new("k", false));
    let created = volume::create(&settings, provider.as_ref(), None).unwrap();
    let sealed = config::parse(created.config_file.as_bytes()).unwrap();
    let volume = volume::unlock(&sealed, provider, KeyLimits::default()).unwrap();
    let page = volume.ring.new_file().unwrap().1;
    (volume, page)
}

#[divan::bench]
fn header_parse(bencher: Bencher<'_, '_>) {
    let (_, page) = made();
    bencher.bench_local(|| header::parse_page(black_box(&page)).into_iter().filter(Result::is_ok).count());
}

#[divan::bench]
fn header_authenticate(bencher: Bencher<'_, '_>) {
    let (volume, page) = made();
    bencher.bench_local(|| volume.ring.authenticate(black_box(&page)).unwrap().is_some());
}

/// From a header to a file's keys, with the data key in memory.
#[divan::bench]
fn cache_hit(bencher: Bencher<'_, '_>) {
    let (volume, page) = made();
    let header = volume.ring.authenticate(&page).unwrap().unwrap();
    volume.ring.open(&header).unwrap();
    bencher.bench_local(|| volume.ring.cached(black_box(&header)).unwrap().is_ok());
}

/// The same for 256 files, by threads that open others of them at the same time.
#[divan::bench(threads = [1, 8])]
fn cache_hit_of_many(bencher: Bencher<'_, '_>) {
    let (volume, _) = made();
    let pages: Vec<_> = (0..256).map(|_| volume.ring.new_file().unwrap().1).collect();
    let headers: Vec<_> = pages.iter().map(|page| volume.ring.authenticate(page).unwrap().unwrap()).collect();
    headers.iter().for_each(|header| drop(volume.ring.open(header).unwrap()));
    let next = AtomicUsize::new(0);
    bencher.bench(|| {
        let at = next.fetch_add(1, Ordering::Relaxed) % headers.len();
        volume.ring.cached(black_box(&headers[at])).unwrap().is_ok()
    });
}

/// A data key of a provider in this process, and a header for a new file.
#[divan::bench]
fn new_file(bencher: Bencher<'_, '_>) {
    let (volume, _) = made();
    bencher.bench_local(|| volume.ring.new_file().unwrap());
}

#[divan::bench(args = [8, 32, 200])]
fn name_seal(bencher: Bencher<'_, '_>, len: usize) {
    let names = VolumeKeys::derive(&DataKey::random(), &[1; 16], Suite::Xaes256Gcm).name;
    let name = vec![b'n'; len];
    bencher.bench_local(|| names.seal(&[2; 16], black_box(&name)));
}

#[divan::bench(args = [8, 32, 200])]
fn name_open(bencher: Bencher<'_, '_>, len: usize) {
    let names = VolumeKeys::derive(&DataKey::random(), &[1; 16], Suite::Xaes256Gcm).name;
    let sealed = names.seal(&[2; 16], &vec![b'n'; len]);
    bencher.bench_local(|| names.open(&[2; 16], black_box(&sealed)).unwrap());
}
