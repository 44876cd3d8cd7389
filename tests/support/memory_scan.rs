//! A search for byte strings in all memory of another process that root can read.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use rustix::process::Pid;

/// Bytes of a pattern by which it is found first.
const PREFIX: usize = 8;
const BLOCK: usize = 1 << 20;

/// Something to look for.
pub(crate) struct Pattern {
    /// What it is: all patterns of one kind are counted together.
    pub(crate) kind: &'static str,
    pub(crate) bytes: Vec<u8>,
}

/// A place where a pattern was found.
pub(crate) struct Found {
    pub(crate) kind: &'static str,
    /// The mapping's path or name; empty for anonymous memory.
    pub(crate) mapping: String,
    /// The mapping is locked into memory and not dumped.
    pub(crate) locked: bool,
    pub(crate) address: u64,
}

/// What a search came to.
pub(crate) struct Scan {
    pub(crate) found: Vec<Found>,
    /// Bytes that were searched.
    pub(crate) searched: u64,
    /// Names of mappings that could not be read at all.
    pub(crate) unreadable: Vec<String>,
}

impl Scan {
    /// How often patterns of this kind were found.
    pub(crate) fn count(&self, kind: &str) -> usize {
        self.found.iter().filter(|found| found.kind == kind).count()
    }

    /// Where patterns of these kinds were found, for people.
    pub(crate) fn places(&self, kinds: &[&str]) -> Vec<String> {
        let found = self.found.iter().filter(|found| kinds.contains(&found.kind));
        found.map(|f| format!("{} at {:x} in {:?} locked={}", f.kind, f.address, f.mapping, f.locked)).collect()
    }
}

struct Mapping {
    begin: u64,
    end: u64,
    readable: bool,
    name: String,
    locked: bool,
}

/// Searches the memory of a process, which goes on running.
pub(crate) fn scan(pid: Pid, patterns: &[Pattern]) -> Scan {
    let memory = File::open(format!("/proc/{}/mem", pid.as_raw_nonzero())).unwrap();
    let index = Index::new(patterns);
    let mut scan = Scan { found: Vec::new(), searched: 0, unreadable: Vec::new() };
    let longest = patterns.iter().map(|pattern| pattern.bytes.len()).max().unwrap();
    for mapping in mappings(pid).into_iter().filter(|mapping| mapping.readable) {
        let mut at = mapping.begin;
        let mut any = false;
        let mut block = vec![0; BLOCK + longest];
        while at < mapping.end {
            let len = usize::try_from(mapping.end - at).unwrap().min(block.len());
            // A mapping may have gone or may not be for others: what was read of it counts.
            let Ok(len @ 1..) = memory.read_at(&mut block[..len], at) else { break };
            any = true;
            index.search(&block[..len], |pattern, offset| {
                // The overlap of two blocks is searched in both.
                if offset < BLOCK {
                    let (kind, mapping_name) = (patterns[pattern].kind, mapping.name.clone());
                    let address = at + offset as u64;
                    scan.found.push(Found { kind, mapping: mapping_name, locked: mapping.locked, address });
                }
            });
            let step = len.min(BLOCK) as u64;
            scan.searched += step;
            at += step;
        }
        if !any {
            scan.unreadable.push(mapping.name);
        }
    }
    scan
}

fn mappings(pid: Pid) -> Vec<Mapping> {
    let text = fs::read_to_string(format!("/proc/{}/smaps", pid.as_raw_nonzero())).unwrap();
    let mut found: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |flag: &str| flags.split(' ').any(|word| word == flag);
            found.last_mut().unwrap().locked = has("lo") && has("dd");
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((begin, end)) = words[0].split_once('-') else { continue };
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let name = words[5..].join(" ");
        let readable = words[1].starts_with('r') && name != "[vvar]" && name != "[vsyscall]";
        found.push(Mapping { begin: number(begin), end: number(end), readable, name, locked: false });
    }
    found
}

/// Patterns by their first bytes.
struct Index<'p> {
    patterns: &'p [Pattern],
    by_prefix: HashMap<[u8; PREFIX], Vec<usize>>,
    /// Whether a pattern begins with these two bytes.
    begins: Vec<bool>,
}

impl<'p> Index<'p> {
    fn new(patterns: &'p [Pattern]) -> Self {
        let mut by_prefix: HashMap<[u8; PREFIX], Vec<usize>> = HashMap::new();
        let mut begins = vec![false; 1 << 16];
        for (number, pattern) in patterns.iter().enumerate() {
            let prefix: [u8; PREFIX] = pattern.bytes[..PREFIX].try_into().unwrap();
            by_prefix.entry(prefix).or_default().push(number);
            begins[usize::from(u16::from_le_bytes([prefix[0], prefix[1]]))] = true;
        }
        Self { patterns, by_prefix, begins }
    }

    fn search(&self, bytes: &[u8], mut found: impl FnMut(usize, usize)) {
        for (at, window) in bytes.windows(PREFIX).enumerate() {
            if !self.begins[usize::from(u16::from_le_bytes([window[0], window[1]]))] {
                continue;
            }
            let numbers = self.by_prefix.get(window).into_iter().flatten();
            let whole = numbers.filter(|number| bytes[at..].starts_with(&self.patterns[**number].bytes));
            whole.for_each(|number| found(*number, at));
        }
    }
}
