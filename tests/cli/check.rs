//! `kmsfs check`: nothing is wrong with what the program wrote, each damage is found where it is, and what repairing and
//! salvaging do.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{self, Argument, Home, Volume, bytes, flip, text, tree};
use kmsfs::check;
use kmsfs::keys::providers::{self, ProviderSettings};
use kmsfs::keys::{KeyLimits, volume};
use kmsfs::storage::CipherDirectory;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, setxattr};
use serde_json::Value;

const PAGE: usize = 4048;
/// More than one thread opens at a time.
const LARGE: usize = 5000 * PAGE + 17;

/// Runs `kmsfs check --json`; returns the exit code and the report.
fn run_check(home: &Home, arguments: &[Argument<'_>]) -> (i32, Value) {
    let all: Vec<Argument<'_>> = [&[&"check" as Argument<'_>, &"--json"], arguments].concat();
    let output = home.kmsfs(&all);
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code().unwrap_or_else(|| panic!("killed: {}", text(&output.stderr))), report)
}

fn assert_clean(home: &Home, arguments: &[Argument<'_>]) -> Value {
    let (code, report) = run_check(home, arguments);
    assert_eq!((code, &report["clean"]), (0, &Value::Bool(true)), "{report:#}");
    assert_eq!(report["findings"].as_array().unwrap().len(), 0, "{report:#}");
    report
}

fn long(letter: &str) -> String {
    letter.repeat(200)
}

/// Something of every kind.
fn fill(root: &Path) {
    for size in [0, 1, PAGE - 1, PAGE, PAGE + 1, 4096, 2 * PAGE, 6 * PAGE, 100_000] {
        fs::write(root.join(format!("{size}")), bytes(size as u64, size)).unwrap();
    }
    let deep = root.join(long("d")).join("e".repeat(176));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join(long("f")), bytes(7, 10_000)).unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    for directory in ["one", "two"] {
        fs::create_dir(root.join(directory)).unwrap();
        fs::write(root.join(directory).join("file"), bytes(8, 3 * PAGE)).unwrap();
    }
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(&bytes(9, 5000), 300_000).unwrap();
    sparse.set_len(500_001).unwrap();
    symlink("1", root.join("link")).unwrap();
    symlink("../".repeat(500), root.join(long("l"))).unwrap();
    symlink("../".repeat(1365), root.join("far")).unwrap();
    fs::hard_link(root.join("1"), root.join("again")).unwrap();
    let mode = Mode::RUSR | Mode::WUSR;
    for (name, kind) in [("fifo", FileType::Fifo), ("socket", FileType::Socket)] {
        rustix::fs::mknodat(CWD, root.join(name), kind, mode, 0).unwrap();
    }
    for name in ["1", "0", "two", "4048"] {
        for attribute in ["user.colour", &format!("user.{}", "x".repeat(240))] {
            setxattr(root.join(name), attribute, b"red", XattrFlags::empty()).unwrap();
        }
    }
}

#[test]
fn what_the_program_wrote_is_clean_with_each_choice_of_a_volume() {
    let suites = ["xaes-256-gcm", "xchacha20-poly1305"];
    for (suite, holes, end) in [
        (suites[0], "allow", "lenient"),
        (suites[0], "deny", "strict"),
        (suites[1], "allow", "strict"),
        (suites[1], "deny", "lenient"),
    ] {
        let volume = Volume::new(&["--suite", suite, "--holes", holes, "--end", end]);
        fill(&volume.plain);
        fs::write(volume.path("large"), bytes(1, LARGE)).unwrap();
        volume.home.ok(&[&"keys", &"provision", &volume.cipher, &"--count", &"3"]);
        assert_clean(&volume.home, &[&volume.plain]);
        volume.unmount();
        let report = assert_clean(&volume.home, &[&volume.cipher]);
        let count = |field: &str| report[field].as_u64().unwrap();
        assert_eq!([count("directories"), count("files"), count("symlinks"), count("others")], [6, 14, 3, 2]);
        let pages = LARGE.div_ceil(PAGE) + [0, 1, 1, 1, 2, 2, 2, 6, 25, 3, 3, 3, 124].iter().sum::<usize>();
        assert_eq!(count("pages"), pages as u64, "each page once, hard links or not");
        assert_eq!(count("unsettled"), 0, "an unmount settles");
        assert_clean(&volume.home, &[&"--repair", &volume.cipher]);
        let keyring = volume.home.path("data/kmsfs/keyring.toml");
        fs::rename(&keyring, volume.home.path("away")).unwrap();
        let structure = assert_clean(&volume.home, &[&"--structure", &volume.cipher]);
        assert_eq!((&structure["files"], &structure["pages"]), (&report["files"], &Value::from(0)));
        assert_eq!(run_check(&volume.home, &[&volume.cipher]).0, 6, "everything else needs the key");
    }
}

#[test]
fn unsettled_files_are_no_finding_and_repairing_settles_them() {
    let volume = Volume::new(&[]);
    let expected = bytes(3, 3 * PAGE + 100);
    fs::write(volume.path("a"), &expected).unwrap();
    volume.kill();
    let report = assert_clean(&volume.home, &[&volume.cipher]);
    assert_eq!(report["unsettled"], 1);
    let report = assert_clean(&volume.home, &[&"--repair", &volume.cipher]);
    assert_eq!(report["settled"], 1);
    assert_eq!(assert_clean(&volume.home, &[&volume.cipher])["unsettled"], 0);
    volume.mount();
    assert_eq!(fs::read(volume.path("a")).unwrap(), expected);
    assert_eq!(fs::metadata(volume.path("a")).unwrap().len(), expected.len() as u64);
}

/// A power cut may leave the attributes of a file and not its header, which they are bound to.
#[test]
fn attributes_whose_header_is_lost_go_when_the_file_gets_another() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("a"), "content").unwrap();
    setxattr(volume.path("a"), "user.colour", b"red", XattrFlags::empty()).unwrap();
    let behind = volume.behind("a");
    volume.unmount();
    File::options().write(true).open(&behind).unwrap().set_len(0).unwrap();
    assert_eq!(run_check(&volume.home, &[&volume.cipher]).0, 15);
    volume.mount();
    assert_eq!(fs::read(volume.path("a")).unwrap(), b"");
    let read = rustix::fs::getxattr(volume.path("a"), "user.colour", &mut [0_u8; 9][..]);
    assert_eq!(read, Err(rustix::io::Errno::NODATA));
    setxattr(volume.path("a"), "user.shape", b"round", XattrFlags::empty()).unwrap();
    fs::write(volume.path("a"), "new").unwrap();
    volume.unmount();
    assert_eq!(stored_attributes(&behind).len(), 1, "the old one is gone, and the new one is not");
    assert_clean(&volume.home, &[&volume.cipher]);
}

/// Nobody can read so many pages of zeros: those that take no space need not be read.
#[test]
fn a_vast_sparse_file_is_checked_and_salvaged_by_its_data() {
    const SIZE: u64 = 4 << 40;
    const PLACES: [u64; 3] = [0, SIZE / 2, SIZE - 9000];
    let volume = Volume::new(&[]);
    let file = File::create_new(volume.path("vast")).unwrap();
    file.set_len(SIZE).unwrap();
    for place in PLACES {
        file.write_all_at(&bytes(place, 9000), place).unwrap();
    }
    drop(file);
    let behind = volume.behind("vast");
    volume.unmount();
    let report = assert_clean(&volume.home, &[&volume.cipher]);
    assert_eq!(report["pages"], SIZE.div_ceil(PAGE as u64));
    let page = PLACES[1] / PAGE as u64;
    flip(&behind, 4096 * (1 + page) + 100);
    let salvaged = volume.home.path("salvaged");
    let (code, report) = run_check(&volume.home, &[&volume.cipher, &"--salvage", &salvaged]);
    let found = &report["findings"];
    assert_eq!(
        (code, &found[0]["kind"], &found[0]["page"]),
        (13, &Value::from("page"), &Value::from(page)),
        "{report:#}"
    );
    let copy = File::open(salvaged.join("files/vast")).unwrap();
    let (stat, mut read) = (copy.metadata().unwrap(), vec![0; 9000]);
    assert!(stat.len() == SIZE && stat.blocks() < 200, "{} blocks", stat.blocks());
    for place in [PLACES[0], PLACES[2]] {
        copy.read_exact_at(&mut read, place).unwrap();
        assert!(read == bytes(place, 9000), "what lies at {place}");
    }
    // Of a file that somebody has made as large as there can be, too.
    File::options().write(true).open(&behind).unwrap().set_len(4096 * 3_000_000_000).unwrap();
    assert_eq!(run_check(&volume.home, &[&volume.cipher]).0, 13);
}

/// An unmounted volume, and where its entries lie in the cipher directory.
struct Original {
    volume: Volume,
    entries: BTreeMap<String, PathBuf>,
}

impl Original {
    fn new(init: &[&str]) -> Self {
        let volume = Volume::new(init);
        fill(&volume.plain);
        volume.home.ok(&[&"keys", &"provision", &volume.cipher, &"--count", &"2"]);
        let plain = support::walk(&volume.plain);
        let entry = |path: &PathBuf| {
            let name = path.strip_prefix(&volume.plain).unwrap();
            let behind = volume.behind(name).strip_prefix(&volume.cipher).unwrap().to_owned();
            (name.to_str().unwrap().to_owned(), behind)
        };
        let entries = plain.iter().map(entry).collect();
        volume.unmount();
        Self { volume, entries }
    }

    fn copy(&self, name: &str) -> Copy<'_> {
        let root = self.volume.home.path(format!("copy of {name}"));
        support::run("cp", &[&"-a", &self.volume.cipher, &root], Path::new("/"));
        Copy { original: self, root }
    }
}

/// A copy of the cipher directory, to be damaged.
struct Copy<'o> {
    original: &'o Original,
    root: PathBuf,
}

impl Copy<'_> {
    /// The ciphertext of a plain path.
    fn at(&self, plain: &str) -> PathBuf {
        self.root.join(&self.original.entries[plain])
    }

    fn home(&self) -> &Home {
        &self.original.volume.home
    }

    fn check(&self) -> (i32, Value) {
        run_check(self.home(), &[&self.root])
    }

    /// The long name's symlink of an entry.
    fn link_of(&self, plain: &str) -> PathBuf {
        PathBuf::from(format!("{}.n", self.at(plain).display()))
    }
}

/// Gives a file a second header slot like the first.
fn second_slot(path: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut slot = [0; 2048];
    file.read_exact_at(&mut slot, 0).unwrap();
    file.write_all_at(&slot, 2048).unwrap();
}

fn swap_pages(a: &Path, at_a: u64, b: &Path, at_b: u64) {
    let open = |path| OpenOptions::new().read(true).write(true).open(path).unwrap();
    let (a, b) = (open(a), open(b));
    let read = |file: &File, page: u64| {
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, 4096 * (page + 1)).unwrap();
        bytes
    };
    let (left, right) = (read(&a, at_a), read(&b, at_b));
    a.write_all_at(&right, 4096 * (at_a + 1)).unwrap();
    b.write_all_at(&left, 4096 * (at_b + 1)).unwrap();
}

/// Changes one character of a symlink's target.
fn flip_target(path: &Path) {
    let mut target = fs::read_link(path).unwrap().to_str().unwrap().as_bytes().to_vec();
    let place = target.len() / 2;
    target[place] = if target[place] == b'A' { b'B' } else { b'A' };
    fs::remove_file(path).unwrap();
    symlink(String::from_utf8(target).unwrap(), path).unwrap();
}

fn stored_attributes(path: &Path) -> Vec<String> {
    let mut buffer = vec![0; 65536];
    let len = rustix::fs::listxattr(path, &mut buffer[..]).unwrap();
    let names = buffer[..len].split(|byte| *byte == 0).map(text);
    names.filter(|name| name.starts_with("user.kmsfs.")).collect()
}

fn old(path: &Path) {
    support::set_times(path, 1_000_000_000, 0);
}

/// A way to damage a volume, and what must come of it.
struct Case {
    name: &'static str,
    damage: fn(&Copy<'_>),
    code: i32,
    /// Kind and first page of each finding, sorted.
    findings: &'static [(&'static str, Option<u64>)],
    /// The plain path in the first finding that has one.
    plain: Option<&'static str>,
    /// The exit code after repairing, and of a check after that.
    repaired: i32,
    /// Whether the structure shows it, without keys.
    structure: bool,
}

const fn case(
    name: &'static str,
    code: i32,
    findings: &'static [(&'static str, Option<u64>)],
    plain: Option<&'static str>,
    damage: fn(&Copy<'_>),
) -> Case {
    Case { name, damage, code, findings, plain, repaired: code, structure: false }
}

const fn mendable(case: Case) -> Case {
    Case { repaired: 0, ..case }
}

const fn structural(case: Case) -> Case {
    Case { structure: true, ..case }
}

const CASES: &[Case] = &[
    case("the only slot flipped", 13, &[("header", None)], Some("8096"), |c| flip(&c.at("8096"), 40)),
    mendable(case("slot A of two flipped", 15, &[("header-slot", None)], Some("8096"), |c| {
        second_slot(&c.at("8096"));
        flip(&c.at("8096"), 40);
    })),
    mendable(case("slot B of two flipped", 15, &[("header-slot", None)], Some("8096"), |c| {
        second_slot(&c.at("8096"));
        flip(&c.at("8096"), 2048 + 40);
    })),
    // A newer program may have written it.
    structural(case("slot B of another version", 15, &[("header-slot", None)], Some("8096"), |c| {
        second_slot(&c.at("8096"));
        OpenOptions::new().write(true).open(c.at("8096")).unwrap().write_all_at(&[2], 2048 + 5).unwrap();
    })),
    case("both slots flipped", 13, &[("header", None)], Some("8096"), |c| {
        second_slot(&c.at("8096"));
        flip(&c.at("8096"), 40);
        flip(&c.at("8096"), 2048 + 40);
    }),
    structural(case("the magic is gone", 13, &[("header", None)], Some("8096"), |c| flip(&c.at("8096"), 0))),
    case("a page flipped", 13, &[("page", Some(2))], Some("24288"), |c| flip(&c.at("24288"), 3 * 4096 + 500)),
    case("the only page", 13, &[("page", Some(0))], Some("4047"), |c| flip(&c.at("4047"), 5000)),
    case("pages moved within a file", 13, &[("page", Some(1)), ("page", Some(4))], Some("24288"), |c| {
        swap_pages(&c.at("24288"), 1, &c.at("24288"), 4);
    }),
    case("pages swapped between files", 13, &[("page", Some(0)), ("page", Some(0))], None, |c| {
        swap_pages(&c.at("24288"), 0, &c.at("8096"), 0);
    }),
    case("an entry moved to another directory", 13, &[("name", None)], None, |c| {
        fs::rename(c.at("24288"), c.at("one").join(c.at("24288").file_name().unwrap())).unwrap();
    }),
    // What is bound to no name can be exchanged unnoticed, as docs/THREATS.md says.
    case("the contents of two files exchanged", 0, &[], None, |c| {
        let [a, b] = [c.at("24288"), c.at("8096")];
        fs::rename(&a, c.root.join("t")).unwrap();
        fs::rename(&b, &a).unwrap();
        fs::rename(c.root.join("t"), &b).unwrap();
    }),
    case("cut at a page", 15, &[("end-mark", Some(2))], Some("24288"), |c| {
        File::options().write(true).open(c.at("24288")).unwrap().set_len(4 * 4096).unwrap();
    }),
    structural(case("cut within the first page", 13, &[("size", None)], Some("24288"), |c| {
        File::options().write(true).open(c.at("24288")).unwrap().set_len(5000).unwrap();
    })),
    structural(case("junk under a good name", 13, &[("header", None)], Some("8096"), |c| {
        fs::write(c.at("8096"), bytes(5, 12288)).unwrap();
    })),
    structural(case("strangers", 15, &[("stray", None), ("stray", None), ("stray", None)], None, |c| {
        fs::write(c.root.join("README"), "x").unwrap();
        fs::create_dir(c.at("one").join(".hidden")).unwrap();
        fs::write(c.root.join(".kmsfs/notes"), "x").unwrap();
    })),
    structural(case("bytes after the last page", 15, &[("stray", None)], Some("100000"), |c| {
        OpenOptions::new().write(true).open(c.at("100000")).unwrap().write_all_at(b"x", 26 * 4096 + 5).unwrap();
    })),
    structural(case("a directory's id missing", 13, &[("directory-id", None)], Some("one"), |c| {
        fs::remove_file(c.at("one").join(".kmsfs.dir")).unwrap();
    })),
    mendable(structural(case(
        "an empty directory's id missing",
        15,
        &[("empty-directory", None)],
        Some("empty"),
        |c| {
            fs::remove_file(c.at("empty").join(".kmsfs.dir")).unwrap();
        },
    ))),
    case("a directory's id flipped", 13, &[("directory-id", None)], Some("two"), |c| {
        flip_target(&c.at("two").join(".kmsfs.dir"));
    }),
    case("the root's id flipped", 13, &[("directory-id", None)], Some(""), |c| flip_target(&c.root.join(".kmsfs.dir"))),
    // Which of the two directories was first is the threads' affair.
    structural(case("another directory's id", 13, &[("same-id", None), ("name", None)], None, |c| {
        let (from, to) = (c.at("two").join(".kmsfs.dir"), c.at("one").join(".kmsfs.dir"));
        fs::remove_file(&to).unwrap();
        symlink(fs::read_link(from).unwrap(), to).unwrap();
    })),
    mendable(structural(case("a long name's symlink without its entry", 15, &[("orphan-link", None)], None, |c| {
        fs::remove_file(c.at(&long("l"))).unwrap();
    }))),
    // The symlink is all that is left of the name.
    structural(case(
        "a long name moved away without its symlink",
        13,
        &[("orphan-link", None), ("long-name", None)],
        None,
        |c| {
            let entry = c.at(&long("l"));
            fs::rename(&entry, c.at("two").join(entry.file_name().unwrap())).unwrap();
        },
    )),
    structural(case("a file that is named like a long name's symlink", 15, &[("stray", None)], None, |c| {
        fs::write(c.root.join("~notes.n"), "somebody's").unwrap();
    })),
    structural(case("a long name's symlink missing", 13, &[("long-name", None)], None, |c| {
        fs::remove_file(c.link_of(&long("l"))).unwrap();
    })),
    structural(case("a long name's symlink flipped", 13, &[("long-name", None)], None, |c| {
        flip_target(&c.link_of(&long("l")));
    })),
    case("a link's target flipped", 13, &[("link", None)], Some("link"), |c| flip_target(&c.at("link"))),
    structural(case("a link's target cut", 13, &[("link", None)], Some("link"), |c| {
        fs::remove_file(c.at("link")).unwrap();
        symlink("abc", c.at("link")).unwrap();
    })),
    case("attributes changed", 13, &[("xattr", None), ("xattr", None)], Some("4048"), |c| {
        for name in stored_attributes(&c.at("4048")) {
            let mut value = vec![0; 4096];
            let len = rustix::fs::getxattr(c.at("4048"), name.as_str(), &mut value[..]).unwrap();
            value[len - 1] ^= 1;
            setxattr(c.at("4048"), name.as_str(), &value[..len], XattrFlags::empty()).unwrap();
        }
    }),
    case("an attribute of a directory copied to another", 13, &[("xattr", None)], Some("one"), |c| {
        let name = stored_attributes(&c.at("two")).remove(0);
        let mut value = vec![0; 4096];
        let len = rustix::fs::getxattr(c.at("two"), name.as_str(), &mut value[..]).unwrap();
        setxattr(c.at("one"), name.as_str(), &value[..len], XattrFlags::empty()).unwrap();
    }),
    structural(case(
        "attributes of a header that never became durable",
        15,
        &[("leftover", None)],
        Some("4048"),
        |c| {
            File::options().write(true).open(c.at("4048")).unwrap().set_len(0).unwrap();
        },
    )),
    structural(case("a header of zeros", 15, &[("no-header", None)], Some("8096"), |c| {
        OpenOptions::new().write(true).open(c.at("8096")).unwrap().write_all_at(&[0; 4096], 0).unwrap();
    })),
    mendable(structural(case("what a crash left", 15, &[("leftover", None), ("leftover", None)], None, |c| {
        for name in ["volume.toml.new", "keys/.00112233445566778899aabbccddeeff.new"] {
            fs::write(c.root.join(".kmsfs").join(name), "x").unwrap();
            old(&c.root.join(".kmsfs").join(name));
        }
        fs::write(c.root.join(".kmsfs/volume.toml.1.new"), "being written now").unwrap();
    }))),
    case("a provisioned key flipped", 15, &[("provisioned-key", None)], None, |c| {
        let mut keys = fs::read_dir(c.root.join(".kmsfs/keys")).unwrap();
        flip(&keys.next().unwrap().unwrap().path(), 60);
    }),
];

fn assert_case(original: &Original, case: &Case) {
    let name = case.name;
    let copy = original.copy(name);
    (case.damage)(&copy);
    let before = support::tree(&copy.root);
    let (code, report) = copy.check();
    let findings = report["findings"].as_array().unwrap_or_else(|| panic!("{name}: {report}"));
    let found: Vec<_> = findings.iter().map(|f| (f["kind"].as_str().unwrap(), f["page"].as_u64())).collect();
    let sorted = |mut list: Vec<(&str, Option<u64>)>| {
        list.sort_unstable();
        list.iter().map(|(kind, page)| format!("{kind} {page:?}")).collect::<Vec<_>>()
    };
    assert_eq!((code, sorted(found)), (case.code, sorted(case.findings.to_vec())), "{name}: {report:#}");
    for finding in findings {
        let cipher = copy.root.join(finding["cipher"].as_str().unwrap());
        assert!(cipher.symlink_metadata().is_ok(), "{name}: {finding} is somewhere");
        assert!(finding["what"].as_str().unwrap().len() > 10, "{name}: {finding}");
    }
    if let Some(plain) = case.plain {
        assert_eq!(findings[0]["plain"], plain, "{name}");
    }
    support::assert_same(name, &before, &support::tree(&copy.root));
    let expected = if case.structure { case.code } else { 0 };
    let (code, structure) = run_check(copy.home(), &[&"--structure", &copy.root]);
    assert_eq!(code, expected, "{name}, without keys: {structure:#}");
    let (code, report) = run_check(copy.home(), &[&"--repair", &copy.root]);
    assert_eq!(code, case.repaired, "{name}, repaired: {report:#}");
    let (code, report) = copy.check();
    assert_eq!(code, case.repaired, "{name}, after repairing: {report:#}");
    if case.code == case.repaired {
        support::assert_same(name, &before, &support::tree(&copy.root));
    }
}

#[test]
fn every_damage_is_found_where_it_is_and_mended_if_nothing_is_lost_by_it() {
    let original = Original::new(&[]);
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(case) = CASES.get(next.fetch_add(1, Ordering::Relaxed)) {
                    assert_case(&original, case);
                }
            });
        }
    });
}

#[test]
fn a_strict_volume_that_denies_holes_refuses_more() {
    let original = Original::new(&["--end", "strict", "--holes", "deny"]);
    let strict = [
        case("cut at a page, strict", 13, &[("end-mark", Some(2))], Some("24288"), |c| {
            File::options().write(true).open(c.at("24288")).unwrap().set_len(4 * 4096).unwrap();
        }),
        case("a page punched", 13, &[("hole", Some(3))], Some("24288"), |c| {
            OpenOptions::new().write(true).open(c.at("24288")).unwrap().write_all_at(&[0; 4096], 4 * 4096).unwrap();
        }),
        structural(case("a header of zeros, strict", 13, &[("no-header", None)], Some("8096"), |c| {
            OpenOptions::new().write(true).open(c.at("8096")).unwrap().write_all_at(&[0; 4096], 0).unwrap();
        })),
        structural(case("a file emptied, strict", 13, &[("no-header", None)], Some("8096"), |c| {
            fs::write(c.at("8096"), "").unwrap();
        })),
    ];
    strict.iter().for_each(|case| assert_case(&original, case));
}

#[test]
fn a_repaired_volume_can_be_mounted_and_has_all_its_content() {
    let volume = Volume::new(&[]);
    fill(&volume.plain);
    let mut expected = support::tree(&volume.plain);
    let (file, empty) = (volume.behind("8096"), volume.behind("empty"));
    volume.unmount();
    second_slot(&file);
    flip(&file, 100);
    fs::remove_file(empty.join(".kmsfs.dir")).unwrap();
    let damaged = fs::metadata(&file).unwrap();
    expected.get_mut(Path::new("8096")).unwrap().modified = (damaged.mtime(), damaged.mtime_nsec());
    assert_eq!(run_check(&volume.home, &[&volume.cipher]).0, 15);
    let (code, report) = run_check(&volume.home, &[&"--repair", &volume.cipher]);
    let repaired = report["findings"].as_array().unwrap().iter().filter(|f| f["repaired"] == true).count();
    assert_eq!((code, repaired), (0, 2), "{report:#}");
    volume.mount();
    fs::create_dir(volume.path("empty/new")).unwrap();
    fs::remove_dir(volume.path("empty/new")).unwrap();
    let mut found = support::tree(&volume.plain);
    // Making an entry in it has changed its time.
    found.insert("empty".into(), expected[Path::new("empty")].clone());
    support::assert_same("the repaired volume", &expected, &found);
    volume.home.refused(11, &[&"check", &"--repair", &volume.cipher]);
}

#[test]
fn a_config_that_is_broken_or_lost_is_told_and_its_copy_put_back() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("a"), "content").unwrap();
    volume.unmount();
    let config = volume.cipher.join(".kmsfs/volume.toml");
    let good = fs::read(&config).unwrap();
    assert_eq!(fs::read(volume.cipher.join(".kmsfs/volume.toml.1")).unwrap(), good, "a copy from the first day on");
    for broken in [None, Some(b"junk".to_vec()), Some(text(&good).replace("lenient", "strict").into_bytes())] {
        let _ = fs::remove_file(volume.cipher.join(".kmsfs/volume.toml.1"));
        fs::remove_file(&config).unwrap();
        if let Some(broken) = &broken {
            fs::write(&config, broken).unwrap();
        }
        let (code, report) = run_check(&volume.home, &[&volume.cipher]);
        assert_eq!((code, &report["findings"][0]["kind"]), (4, &Value::from("config")), "{report:#}");
        volume.home.refused(4, &[&"check", &"--repair", &volume.cipher]);
        fs::write(volume.cipher.join(".kmsfs/volume.toml.1"), &good).unwrap();
        let said = volume.home.refused(4, &[&"check", &volume.cipher]);
        assert!(said.contains("--repair"), "{said}");
        let (code, report) = run_check(&volume.home, &[&"--repair", &volume.cipher]);
        assert_eq!((code, &report["findings"][0]["repaired"]), (0, &Value::Bool(true)), "{report:#}");
        assert_eq!(fs::read(&config).unwrap(), good);
        assert_clean(&volume.home, &[&volume.cipher]);
    }
    let aside: Vec<_> = ["0", "1"].map(|n| volume.cipher.join(format!(".kmsfs/volume.toml.broken.{n}"))).to_vec();
    assert_eq!(fs::read(&aside[0]).unwrap(), b"junk", "what was the config is kept");
    assert!(aside[1].exists());
}

#[test]
fn salvaging_copies_what_opens_and_says_what_does_not() {
    let original = Original::new(&[]);
    let copy = original.copy("salvage");
    let content = bytes(6 * PAGE as u64, 6 * PAGE);
    for page in [1, 2, 4] {
        flip(&copy.at("24288"), 4096 * (page + 1) + 77);
    }
    flip(&copy.at("8096"), 40);
    // The last page of one that is partly full: its length comes from the size on disk.
    flip(&copy.at("100000"), 4096 * 25 + 9);
    let (moved, name) = (copy.at("4049"), copy.at("4049").file_name().unwrap().to_owned());
    fs::rename(moved, copy.at("two").join(&name)).unwrap();
    fs::remove_file(copy.at("one").join(".kmsfs.dir")).unwrap();
    let into = copy.home().path("salvaged");
    let (code, report) = run_check(copy.home(), &[&"--salvage", &into, &copy.root]);
    assert_eq!(code, 13, "{report:#}");
    let salvaged = report["salvaged"].as_array().unwrap();
    let of =
        |plain: &str| salvaged.iter().find(|s| s["plain"] == plain).unwrap_or_else(|| panic!("{plain}: {report:#}"));

    let range = |offset: usize, len: usize| serde_json::json!({ "offset": offset, "len": len });
    let mut expected = content;
    expected[PAGE..3 * PAGE].fill(0);
    expected[4 * PAGE..5 * PAGE].fill(0);
    assert_eq!(fs::read(into.join("files/24288")).unwrap(), expected);
    assert_eq!(of("24288")["zeroed"], Value::from(vec![range(PAGE, 2 * PAGE), range(4 * PAGE, PAGE)]));
    let mut expected = bytes(100_000, 100_000);
    expected[24 * PAGE..].fill(0);
    assert_eq!(fs::read(into.join("files/100000")).unwrap(), expected);
    assert_eq!(of("100000")["zeroed"], Value::from(vec![range(24 * PAGE, 100_000 - 24 * PAGE)]));
    assert_eq!(of("8096")["copy"], Value::Null);
    assert!(of("8096")["why"].as_str().unwrap().contains("does not authenticate"));
    assert!(!into.join("files/8096").exists());
    // What no name leads to is there under the names of its ciphertext.
    let below = |path: PathBuf| into.join("unreachable").join(path.strip_prefix(&copy.root).unwrap());
    assert_eq!(fs::read(below(copy.at("two").join(&name))).unwrap(), bytes(4049, 4049));
    assert_eq!(fs::read(below(copy.at("one/file"))).unwrap(), bytes(8, 3 * PAGE));
    let written: Value = serde_json::from_slice(&fs::read(into.join("report.json")).unwrap()).unwrap();
    assert_eq!(written, report["salvaged"]);
    let whole = support::walk(&into).iter().filter(|path| path.is_file()).count();
    assert_eq!(
        whole,
        1 + 2 + 1 + 1,
        "the report, two damaged files, the moved one, one of the directory without an id"
    );

    copy.home().refused(2, &[&"check", &"--salvage", &into, &copy.root]);
    copy.home().refused(2, &[&"check", &"--salvage", &copy.root.join("x"), &copy.root]);
}

#[test]
fn a_part_of_a_volume_is_checked_by_its_path_on_either_side() {
    let volume = Volume::new(&[]);
    fill(&volume.plain);
    let deep = Path::new(&long("d")).join("e".repeat(176));
    let (damaged, directory) = (volume.behind("8096"), volume.behind(&deep));
    flip(&damaged, 5000);
    for good in [volume.path("24288"), volume.path(&deep), volume.path("link"), directory] {
        let report = assert_clean(&volume.home, &[&good]);
        assert!(report["files"].as_u64().unwrap() <= 1, "{report:#}");
    }
    for bad in [volume.path("8096"), damaged, volume.plain.clone()] {
        let (code, report) = run_check(&volume.home, &[&volume.path("1"), &bad]);
        assert_eq!((code, &report["findings"][0]["plain"]), (13, &Value::from("8096")), "{report:#}");
    }
    volume.home.refused(3, &[&"check", &volume.path("missing")]);
    volume.home.refused(3, &[&"check", &volume.home.path("")]);
    volume.home.refused(2, &[&"check", &"--structure", &volume.path("1")]);
}

#[test]
fn people_read_where_and_what_in_one_line() {
    let volume = Volume::new(&[]);
    fill(&volume.plain);
    let file = volume.behind("24288");
    volume.unmount();
    flip(&file, 4096 + 50);
    flip(&file, 2 * 4096 + 50);
    let output = volume.home.kmsfs(&[&"check", &volume.cipher]);
    let (said, told) = (text(&output.stdout), text(&output.stderr));
    let name = file.file_name().unwrap().to_str().unwrap();
    let expected = format!(
        "damage: 24288 ({name}): pages 0 to 1: the page does not authenticate: it was changed or moved on disk\n"
    );
    assert!(said.starts_with(&expected), "{said}");
    assert!(said.contains("not clean: ") && said.contains("13 files"), "{said}");
    assert!(told.contains("1 damaged, 0 unreadable") && told.contains("--salvage"), "{told}");
}

/// The library's check of one entry, without the waits for a writer.
fn look(directory: &CipherDirectory, volume: &kmsfs::keys::Volume, entry: &str) -> Vec<check::Finding> {
    let settings = check::Settings { parallel: 1, alone: true, salvage: false };
    let checker = check::Checker::new(directory, &volume.config, Some(volume), settings).unwrap();
    checker.run(&[check::Target::Cipher(vec![entry.to_owned()])]).unwrap()
}

/// The library's view of a volume.
fn unlocked(made: &Volume) -> (CipherDirectory, kmsfs::keys::Volume) {
    let directory = CipherDirectory::open(&made.cipher).unwrap();
    let sealed = kmsfs::format::config::parse(&directory.read_config().unwrap()).unwrap();
    let (kind, key) = volume::keys_that_can_unlock(&sealed.config).remove(0);
    let keyring = made.home.path("data/kmsfs/keyring.toml");
    let provider = providers::open(kind, &key.key, Some(&keyring), &ProviderSettings::default()).unwrap();
    let volume = volume::unlock(&sealed, provider, KeyLimits::default()).unwrap();
    (directory, volume)
}

#[test]
fn a_repair_whose_volume_another_has_taken_over_changes_nothing() {
    let made = Volume::new(&[]);
    for name in ["slot", "unsettled"] {
        fs::write(made.path(name), bytes(1, PAGE + 1000)).unwrap();
    }
    let (slot, unsettled) = (made.behind("slot"), made.behind("unsettled"));
    made.unmount();
    second_slot(&slot);
    flip(&slot, 40);
    let file = OpenOptions::new().write(true).open(&unsettled).unwrap();
    file.set_len(3 * 4096).unwrap();
    symlink("x", made.cipher.join(format!("~{}.n", "A".repeat(43)))).unwrap();
    let before = tree(&made.cipher);
    let (directory, volume) = unlocked(&made);
    let settings = check::Settings { parallel: 1, alone: true, salvage: false };
    for may in [false, true] {
        let checker = check::Checker::new(&directory, &volume.config, Some(&volume), settings).unwrap();
        let mut findings = checker.run(&[check::Target::Cipher(Vec::new())]).unwrap();
        let mendable = findings.iter().filter(|finding| finding.repairable).count();
        let lost = || Err(std::io::Error::other("another has it"));
        let settled = checker.mend(&mut findings, &|| if may { Ok(()) } else { lost() }).unwrap();
        let mended = findings.iter().filter(|finding| finding.repaired).count();
        assert_eq!((mended, settled), if may { (mendable, 1) } else { (0, 0) }, "{findings:?}");
        assert!(mendable >= 2, "{findings:?}");
        if !may {
            support::assert_same("nothing", &tree(&made.cipher), &before);
            assert!(findings.iter().any(|finding| finding.what.contains("not repaired: another has it")));
        }
    }
}

#[test]
fn every_byte_of_a_file_counts() {
    let made = Volume::new(&[]);
    fs::write(made.path("file"), bytes(1, PAGE + 1000)).unwrap();
    symlink("target", made.path("link")).unwrap();
    let (file, link) = (made.behind("file"), made.behind("link"));
    made.unmount();
    let (directory, volume) = unlocked(&made);
    let entry = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(look(&directory, &volume, &entry(&file)), []);
    let on_disk = OpenOptions::new().read(true).write(true).open(&file).unwrap();
    let good = fs::read(&file).unwrap();
    assert_eq!(good.len(), 3 * 4096 + 1000);
    for (at, byte) in good.iter().enumerate() {
        on_disk.write_all_at(&[byte ^ (1 << (at % 8))], at as u64).unwrap();
        let found = look(&directory, &volume, &entry(&file));
        assert_eq!(found.len(), 1, "byte {at}: {found:?}");
        on_disk.write_all_at(&[*byte], at as u64).unwrap();
    }
    for len in (0..good.len()).filter(|len| len % 61 == 0 || len % 4096 < 2) {
        on_disk.set_len(len as u64).unwrap();
        let found = look(&directory, &volume, &entry(&file));
        // What only the size on disk tells is not missed: an empty file, less of the last page.
        let is_a_file = [0, 4096].contains(&len) || len >= 3 * 4096;
        assert_eq!(found.is_empty(), is_a_file, "{len} bytes: {found:?}");
        on_disk.write_all_at(&good, 0).unwrap();
    }
    assert_eq!(look(&directory, &volume, &entry(&file)), []);
    let target = fs::read_link(&link).unwrap().to_str().unwrap().to_owned();
    for at in 0..target.len() {
        let mut changed = target.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        fs::remove_file(&link).unwrap();
        symlink(String::from_utf8(changed).unwrap(), &link).unwrap();
        assert_eq!(look(&directory, &volume, &entry(&link)).len(), 1, "character {at}");
    }
}

/// One thread of a busy mount: everything that changes more than one thing on disk.
fn be_busy(root: &Path, thread: u64, stop: &AtomicBool) {
    let path = |name: String| root.join(format!("{thread} {name}"));
    let database =
        File::options().read(true).write(true).create(true).truncate(false).open(path("database".into())).unwrap();
    let mut round = 0_usize;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let seed = round as u64;
        let (short, name) = (path("short".into()), path(long("n")));
        fs::write(&short, bytes(seed, (round * 977) % 60_000)).unwrap();
        fs::rename(&short, &name).unwrap();
        database.write_all_at(&bytes(seed, 10_000), (seed * 7919) % 100_000).unwrap();
        if round.is_multiple_of(3) {
            database.set_len((seed * 131) % 200_000).unwrap();
        }
        if round.is_multiple_of(5) {
            database.sync_data().unwrap();
        }
        File::options()
            .append(true)
            .create(true)
            .open(path("log".into()))
            .unwrap()
            .write_all(&bytes(seed, 700))
            .unwrap();
        let directory = path(format!("dir{}", long("m")));
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("inside"), bytes(seed, 5000)).unwrap();
        setxattr(directory.join("inside"), "user.round", &seed.to_le_bytes(), XattrFlags::empty()).unwrap();
        symlink("target", directory.join("link")).unwrap();
        fs::rename(directory.join("inside"), path("moved".into())).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        fs::remove_file(&name).unwrap();
    }
}

#[test]
fn a_check_of_a_busy_mount_finds_nothing_wrong() {
    let volume = Volume::new(&[]);
    fill(&volume.plain);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (root, stop) = (&volume.plain, &stop);
            scope.spawn(move || be_busy(root, thread, stop));
        }
        let checks = std::panic::catch_unwind(|| {
            for _ in 0..15 {
                assert_clean(&volume.home, &[&volume.plain]);
                assert_clean(&volume.home, &[&"--structure", &volume.cipher]);
            }
        });
        stop.store(true, Ordering::Relaxed);
        if let Err(failure) = checks {
            std::panic::resume_unwind(failure);
        }
    });
    volume.unmount();
    assert_clean(&volume.home, &[&volume.cipher]);
}
