//! A process that has no descriptors left. Alone in its program: the limit is the process's.
#![allow(clippy::unwrap_used)] // how a test fails

mod support;

use std::fs::{self, File};
use std::io;

use crate::support::library::{Library, ME, wait};
use kmsfs::crypto::Suite;
use kmsfs::format::config::{End, Holes};
use kmsfs::fs::{NodeKind, ROOT};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};

/// More than are held back for such a case.
const ATTEMPTS: usize = 100;

#[test]
fn without_a_descriptor_nothing_is_half_made() {
    setrlimit(Resource::Nofile, Rlimit { current: Some(200), maximum: Some(200) }).unwrap();
    let library = Library::new(Suite::Xaes256Gcm, Holes::Allow, End::Lenient);
    let fs = library.fs.clone().unwrap();
    let mknod = |name: &[u8], kind| {
        wait(|send| fs.mknod(ROOT, name, (kind, 0), 0o600, ME, Box::new(move |made| send.send(made).unwrap())))
    };
    let make = |kind: &str, name: &[u8]| match kind {
        "directory" => fs.mkdir(ROOT, name, 0o755, ME),
        "link" => fs.symlink(ROOT, name, b"target", ME),
        "long link" => fs.symlink(ROOT, name, &[b't'; 4000], ME),
        "fifo" => mknod(name, NodeKind::Fifo),
        _ => mknod(name, NodeKind::File),
    };
    let all: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    let (mut made, mut long_links) = (0, 0);
    for kind in ["directory", "link", "long link", "fifo", "file"] {
        let refusal = (0..ATTEMPTS).find_map(|number| {
            let result = make(kind, format!("{kind} {number}").as_bytes());
            made += usize::from(result.is_ok());
            long_links += usize::from(result.is_ok() && kind == "long link");
            result.err()
        });
        assert_eq!(refusal.unwrap().errno(), Errno::MFILE.raw_os_error(), "{kind}");
    }
    drop(all);
    let count = |path| fs::read_dir(path).map_or(0, |entries| entries.filter(is_entry).count());
    assert_eq!(count(library.cipher.clone()), made);
    assert_eq!(count(library.cipher.join(".kmsfs/links")), long_links);
}

/// What begins with a dot belongs to the volume.
fn is_entry(entry: &io::Result<fs::DirEntry>) -> bool {
    !entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.')
}
