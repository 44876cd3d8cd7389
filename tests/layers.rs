//! Holds the arrows of `docs/ARCHITECTURE.md` against the sources.
#![allow(clippy::unwrap_used)] // a test fails by panicking
#![allow(clippy::print_stdout)] // one test only tells

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Which modules of ours each module may import.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("crypto", &[]),
    ("format", &[]),
    ("storage", &["format"]),
    ("meter", &[]),
    ("keys", &["crypto", "format", "meter"]),
    ("audit", &["crypto", "format", "keys"]),
    ("content", &["crypto", "format", "storage"]),
    ("lease", &["crypto", "format", "storage", "runtime"]),
    ("fs", &["content", "keys", "lease", "storage", "format", "crypto", "meter", "runtime"]),
    ("runtime", &[]),
    ("check", &["content", "keys", "storage", "format", "crypto", "runtime"]),
    ("transfer", &["fs", "lease", "content", "keys", "storage", "format", "runtime"]),
    ("mount", &["fs"]),
    ("daemon", &["runtime"]),
    (
        "cli",
        &[
            "crypto", "format", "storage", "keys", "lease", "content", "fs", "check", "transfer", "mount", "daemon",
            "audit", "meter",
        ],
    ),
];
/// Of crypto, the filesystem knows the names of keys and nothing that computes with pages.
const FS_MAY_NAME: &[&str] = &["FileKeys", "LinkKey", "NameKey"];
/// Of format, storage knows how the volume's own files are called and how long a config may be.
const STORAGE_MAY_NAME: &[&str] = &["config", "lease", "name"];
/// The floors of `fs` from below. A file imports from its own floor and those below it, each thing from the file that has it.
const FS_FLOORS: &[&[&str]] = &[
    &["error", "caller", "kernel", "metrics"],
    &["state"],
    &["filesystem"],
    &["ops"],
    &["background"],
    &["lifecycle"],
];
/// A file longer than this is named, so that somebody asks whether it has two reasons to exist.
const LONG_FILE: usize = 400;

struct Source {
    path: PathBuf,
    module: String,
    /// Without comments and without the tests at its end.
    code: String,
    lines: usize,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut directories = vec![root.clone()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.to_string_lossy().ends_with("tests.rs") {
                found.push(source(&root, path));
            }
        }
    }
    assert!(found.len() > 40, "the sources were not found");
    found
}

fn source(root: &Path, path: PathBuf) -> Source {
    let text = fs::read_to_string(&path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let code: String = code.lines().map(|line| line.split("//").next().unwrap().to_owned() + "\n").collect();
    let relative = path.strip_prefix(root).unwrap();
    let module = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
    Source { lines: text.lines().count(), path: relative.to_path_buf(), module, code }
}

/// The names that follow `prefix` in paths of the code.
fn names_after(code: &str, prefix: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let names = code.match_indices(prefix).flat_map(|(at, _)| {
        let rest = &code[at + prefix.len()..];
        match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap().split(',').map(|name| word(name.trim())).collect(),
            None => vec![word(rest)],
        }
    });
    names.filter(|name| !name.is_empty()).collect()
}

/// `(module, first name in it)` for everything of ours that the code refers to by `crate::`.
fn imports(code: &str) -> Vec<(String, String)> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let module = word(rest);
        let rest = rest[module.len()..].trim_start_matches("::");
        if let Some(list) = rest.strip_prefix('{') {
            let list = list.split('}').next().unwrap();
            found.extend(list.split(',').map(|name| (module.clone(), word(name.trim()))));
        } else {
            found.push((module, word(rest)));
        }
    }
    found
}

#[test]
fn arrows_go_one_way() {
    let allowed: BTreeMap<_, _> = MAY_IMPORT.iter().copied().collect();
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| !["lib", "main"].contains(&source.module.as_str())) {
        let may = allowed.get(source.module.as_str()).unwrap_or_else(|| panic!("new module {}", source.module));
        for (module, name) in imports(&source.code) {
            let exception = match (source.module.as_str(), module.as_str()) {
                ("fs", "crypto") => !FS_MAY_NAME.contains(&name.as_str()),
                ("storage", "format") => !STORAGE_MAY_NAME.contains(&name.as_str()),
                _ => false,
            };
            if module != source.module && (!may.contains(&module.as_str()) || exception) {
                wrong.push(format!("{}: crate::{module}::{name}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "forbidden arrows:\n{}", wrong.join("\n"));
}

#[test]
fn floors_of_fs_go_one_way() {
    let floor = |name: &str| FS_FLOORS.iter().position(|floor| floor.contains(&name));
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.module == "fs" && source.path != Path::new("fs/mod.rs")) {
        let parts: Vec<&str> = source.path.iter().skip(1).map(|part| part.to_str().unwrap()).collect();
        let own = floor(parts[0].trim_end_matches(".rs"));
        let own = own.unwrap_or_else(|| panic!("{} is on no floor", source.path.display()));
        let mut names = names_after(&source.code, "crate::fs::");
        names.extend(names_after(&source.code, "super::super::"));
        if parts.len() == 1 {
            names.extend(names_after(&source.code, "super::"));
        }
        let is_above = |name: &&String| floor(name).is_none_or(|floor| floor > own);
        wrong.extend(names.iter().filter(is_above).map(|name| format!("{}: {name}", source.path.display())));
    }
    assert!(wrong.is_empty(), "forbidden arrows within fs:\n{}", wrong.join("\n"));
}

/// The methods of `Filesystem` that a file declares.
fn methods(source: &Source) -> impl Iterator<Item = String> {
    let blocks = source.code.split("\nimpl Filesystem {\n").skip(1).filter_map(|block| block.split("\n}\n").next());
    blocks.flat_map(|block| names_after(block, "fn "))
}

/// A method of `Filesystem` is an arrow that no import shows.
#[test]
fn methods_of_fs_call_none_of_a_floor_above() {
    let sources = sources();
    let on = |names: &[&str]| {
        let is_on = |source: &&Source| {
            let name = source.path.iter().nth(1).map(|name| name.to_string_lossy().into_owned());
            source.module == "fs" && name.is_some_and(|name| names.contains(&name.trim_end_matches(".rs")))
        };
        sources.iter().filter(is_on).collect::<Vec<_>>()
    };
    let mut wrong = Vec::new();
    for (at, floor) in FS_FLOORS.iter().enumerate().skip(2) {
        for name in on(&FS_FLOORS[at + 1..].concat()).into_iter().flat_map(methods) {
            let calls = ["self", "fs"].map(|fs| format!("{fs}.{name}("));
            let callers = on(floor).into_iter().filter(|source| calls.iter().any(|call| source.code.contains(call)));
            wrong.extend(callers.map(|source| format!("{}: {name}", source.path.display())));
        }
    }
    assert!(wrong.is_empty(), "forbidden calls within fs:\n{}", wrong.join("\n"));
}

#[test]
fn only_main_knows_the_command_line() {
    for source in sources().iter().filter(|source| source.module != "cli" && source.module != "lib") {
        let uses =
            source.code.contains("crate::cli") || (source.module != "main" && source.code.contains("kmsfs::cli"));
        assert!(!uses, "{} imports cli", source.path.display());
    }
}

#[test]
fn fuser_stays_in_mount_and_providers_keep_their_runtimes() {
    for source in sources() {
        let path = source.path.display().to_string();
        if source.module != "mount" {
            assert!(!source.code.contains("fuser::"), "{path} uses fuser");
        }
        if !path.starts_with("keys/providers") {
            assert!(!source.code.contains("tokio::") && !source.code.contains("aws_sdk"), "{path} uses a runtime");
            let clients = ["ureq::", "cryptoki::", "bech32::"];
            assert!(!clients.iter().any(|client| source.code.contains(client)), "{path} uses a provider's client");
        }
    }
}

/// The kernel is told errnos from one table. Others may look at errnos that the system gave them.
#[test]
fn errnos_are_made_in_one_place() {
    for source in sources().iter().filter(|source| ["fs", "mount", "content"].contains(&source.module.as_str())) {
        let path = source.path.display().to_string();
        if path == "fs/error.rs" {
            continue;
        }
        for word in ["Errno::E", "libc::E"] {
            assert!(!source.code.contains(word), "{path} names an errno");
        }
    }
}

#[test]
fn only_cli_talks_to_people() {
    for source in sources().iter().filter(|source| source.module != "cli") {
        for word in ["println!", "eprint!", "print!(", "dbg!"] {
            assert!(!source.code.contains(word), "{} prints", source.path.display());
        }
    }
}

#[test]
fn the_pure_modules_neither_log_nor_touch_files() {
    for source in sources().iter().filter(|source| ["crypto", "format"].contains(&source.module.as_str())) {
        for word in ["tracing::", "std::fs", "rustix::", "std::io"] {
            assert!(!source.code.contains(word), "{} uses {word}", source.path.display());
        }
    }
}

#[test]
fn long_files_are_named() {
    for source in sources().iter().filter(|source| source.lines > LONG_FILE) {
        println!("{} has {} lines: has it one reason to exist?", source.path.display(), source.lines);
    }
}

#[test]
fn paths_in_the_documents_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let in_docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let in_root = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let documents = in_docs.chain(in_root).filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let is_of_a_path = |c: char| c.is_ascii_alphanumeric() || "_-./*{@".contains(c);
    let is_ours = |word: &&str| {
        let first = word.split('/').next().unwrap_or_default();
        word.contains('/')
            && ["src", "tests", "scripts", "docs", "systemd", "fuzz", "benches", "findings"].contains(&first)
    };
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        let words = text.split(|c| !is_of_a_path(c)).filter(is_ours).filter(|word| !word.contains(['*', '{']));
        let missing: Vec<_> = words.filter(|word| !root.join(word.trim_end_matches('.')).exists()).collect();
        assert!(missing.is_empty(), "{} names what is not there: {missing:?}", document.display());
    }
}
