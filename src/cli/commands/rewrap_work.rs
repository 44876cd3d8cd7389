//! The work of `kmsfs rewrap`: which files and provisioned keys have other records than they should, and giving them those,
//! many at a time.
//!
//! Invariants: one call for a data key, however many files have it; a file is looked at again right before it is changed; what
//! failed stays as it was and is told; a key that keeps being refused is not asked about for every file.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cli::error::{CliError, Exit};
use crate::cli::progress::{self, Step};
use crate::cli::report;
use crate::format::header::Record;
use crate::keys::{AuthenticHeader, KeyError, Missing, Ring, Wanted};
use crate::storage::KeyStock;

use super::header_files::HeaderFiles;
use super::header_writer::HeaderWriter;
use super::plain_names::PlainNames;

/// While a provider throttles or cannot be reached: the wait before the next try, and how long without any success.
const PAUSE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(60);
/// So many refusals in a row of files under the same keys are enough.
const REFUSALS: u32 = 64;
/// Reasons of failures that are told.
const TOLD: usize = 20;
/// Characters of a reason that are told again with its count.
const SHOWN: usize = 100;

/// What there is to do.
#[derive(Default)]
pub(super) struct Todo {
    /// Files with a header.
    pub(super) files: u64,
    /// Those whose records are not as they should be.
    pub(super) to_change: u64,
    /// Data keys of those.
    pub(super) data_keys: u64,
    pub(super) provisioned: u64,
    pub(super) missing: Missing,
    items: VecDeque<Item>,
}

enum Item {
    /// Files that had this data key when they were looked at, and its records, if a file has them already.
    Files {
        data_key: [u8; 16],
        paths: Vec<String>,
        made: Option<Vec<Record>>,
    },
    Provisioned(String),
}

/// What became of it.
pub(super) struct Done {
    pub(super) files: u64,
    pub(super) provisioned: u64,
    pub(super) failed: u64,
    pub(super) first_failure: Option<CliError>,
}

impl Done {
    /// Takes another round into account.
    pub(super) fn add(&mut self, more: Self) {
        self.files += more.files;
        self.provisioned += more.provisioned;
        self.failed += more.failed;
        self.first_failure = self.first_failure.take().or(more.first_failure);
    }
}

pub(super) struct Work<'a> {
    pub(super) ring: &'a Ring,
    pub(super) files: &'a HeaderFiles,
    pub(super) names: &'a PlainNames<'a>,
    pub(super) writer: &'a HeaderWriter<'a>,
    pub(super) stock: &'a KeyStock,
    pub(super) wanted: &'a [Wanted],
    pub(super) failures: Failures,
}

/// What could not be done.
#[derive(Default)]
pub(super) struct Failures {
    count: AtomicU64,
    first: Mutex<Option<CliError>>,
    /// How many failed for the same reason, which is told once.
    reasons: Mutex<BTreeMap<String, u64>>,
    /// Refusals in a row, by the keys that a file is under.
    refused: Mutex<HashMap<Vec<Vec<u8>>, u32>>,
}

impl Failures {
    fn tell(&self, what: &str, error: CliError) {
        self.count.fetch_add(1, Ordering::SeqCst);
        let mut reasons = locked(&self.reasons);
        let same = reasons.entry(reason(&error.to_string())).or_default();
        *same += 1;
        let is_new = *same == 1;
        if is_new && reasons.len() <= TOLD {
            report::tell(&format!("{what}: {error}"));
        }
        drop(reasons);
        locked(&self.first).get_or_insert(error);
    }

    /// Says how many others failed for the reasons that were told.
    fn tell_counts(&self) {
        let reasons = std::mem::take(&mut *locked(&self.reasons));
        let alone = reasons.len() == 1;
        for (reason, more) in reasons.iter().map(|(reason, count)| (reason, count - 1)).filter(|(_, more)| *more > 0) {
            let start: String = reason.chars().take(SHOWN).collect();
            let of = if alone { String::new() } else { format!(": {start}") };
            report::tell(&format!("{more} more for the same reason{of}"));
        }
    }

    fn of_keys(&self, records: &[Record]) -> u32 {
        locked(&self.refused).get(&keys_of(records)).copied().unwrap_or(0)
    }

    fn note(&self, records: &[Record], refused: bool) {
        let mut all = locked(&self.refused);
        if refused {
            *all.entry(keys_of(records)).or_default() += 1;
        } else {
            all.remove(&keys_of(records));
        }
    }
}

/// A message without what is different each time.
fn reason(message: &str) -> String {
    let Some((before, rest)) = message.split_once(" (request id ") else { return message.to_owned() };
    let after = rest.split_once(')').map_or("", |(_, after)| after);
    format!("{before}{after}")
}

fn keys_of(records: &[Record]) -> Vec<Vec<u8>> {
    records.iter().map(|record| record.key_id.clone()).collect()
}

impl Work<'_> {
    /// Reads all headers at or below `start`, a path in the cipher directory; with `all`, the provisioned keys too.
    pub(super) fn find(&self, start: &str, all: bool, shared: bool) -> Result<Todo, CliError> {
        let mut todo = Todo::default();
        let mut groups: HashMap<[u8; 16], (Vec<String>, Missing)> = HashMap::new();
        let mut made: HashMap<[u8; 16], Vec<Record>> = HashMap::new();
        self.files.walk(start, |path, page| {
            let page = match page {
                Ok(page) => page,
                Err(error) => return self.tell(path, CliError::io("cannot be read", &error)),
            };
            let header = match page.map(|page| self.ring.authenticate(&page)).transpose() {
                Ok(header) => header.flatten(),
                Err(error) => return self.tell(path, error.into()),
            };
            let Some(header) = header else { return };
            todo.files += 1;
            let (id, records) = (header.header().data_key_id, &header.header().records);
            if Wanted::are_all(self.wanted, records) {
                if shared {
                    made.entry(id).or_insert_with(|| self.wanted_of(records));
                }
                return;
            }
            todo.to_change += 1;
            let group = groups.entry(id).or_insert_with(|| (Vec::new(), Wanted::missing(self.wanted, records)));
            group.0.push(path.to_owned());
        });
        self.failures.tell_counts();
        todo.data_keys = groups.len() as u64;
        for (id, (paths, missing)) in groups {
            let made = made.get(&id).cloned();
            if made.is_none() {
                todo.missing = add(todo.missing, missing);
            }
            todo.items.push_back(Item::Files { data_key: id, paths, made });
        }
        if all {
            self.find_provisioned(&mut todo)?;
        }
        Ok(todo)
    }

    /// Of what is at `path` in the cipher directory.
    fn tell(&self, path: &str, error: CliError) {
        let plain = self.names.plain_path(path);
        let name = plain.map_or_else(|| path.into(), |plain| String::from_utf8_lossy(&plain).into_owned());
        self.failures.tell(&name, error);
    }

    fn find_provisioned(&self, todo: &mut Todo) -> Result<(), CliError> {
        let names = self.stock.names().map_err(|error| CliError::io(".kmsfs/keys", &error))?;
        for name in names {
            let record = self.stock.read(&name).and_then(|bytes| self.ring.record_of_provisioned(&name, &bytes));
            let Some(record) = record.filter(|record| !self.is_wanted(record)) else { continue };
            todo.missing = add(todo.missing, Wanted::missing(&self.wanted[..1], &[record]));
            todo.provisioned += 1;
            todo.items.push_back(Item::Provisioned(name));
        }
        Ok(())
    }

    fn is_wanted(&self, record: &Record) -> bool {
        self.wanted.iter().any(|key| Wanted::are_all(std::slice::from_ref(key), std::slice::from_ref(record)))
    }

    fn wanted_of(&self, records: &[Record]) -> Vec<Record> {
        records.iter().filter(|record| self.is_wanted(record)).cloned().collect()
    }

    /// Does it, `parallel` calls at a time, and makes it durable.
    pub(super) fn run(&self, todo: Todo, parallel: usize) -> Result<Done, CliError> {
        let total = todo.to_change + todo.provisioned;
        let threads = todo.items.len().min(parallel);
        let running = Running {
            work: self,
            items: Mutex::new(todo.items),
            total,
            files: AtomicU64::new(0),
            provisioned: AtomicU64::new(0),
            last_success: Mutex::new(Instant::now()),
        };
        // What an earlier run wrote into the other slot must be durable before this one writes over the first.
        self.files.sync()?;
        progress::show_while(
            || running.step(),
            || {
                std::thread::scope(|scope| {
                    let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| running.work())).collect();
                    for worker in workers {
                        // A thread that panicked has printed why; what it did not do is missing in the count.
                        let _ = worker.join();
                    }
                });
            },
        );
        self.failures.tell_counts();
        self.files.sync()?;
        self.stock.sync().map_err(|error| CliError::io(".kmsfs/keys", &error))?;
        let (files, provisioned) = (running.files.load(Ordering::SeqCst), running.provisioned.load(Ordering::SeqCst));
        let failed = self.failures.count.load(Ordering::SeqCst);
        let left = total.saturating_sub(files + provisioned);
        let mut first_failure = locked(&self.failures.first).take();
        if left > 0 && first_failure.is_none() {
            first_failure = Some(CliError::new(Exit::Other, "a thread failed"));
        }
        Ok(Done { files, provisioned, failed: failed.max(left), first_failure })
    }
}

struct Running<'a> {
    work: &'a Work<'a>,
    items: Mutex<VecDeque<Item>>,
    total: u64,
    files: AtomicU64,
    provisioned: AtomicU64,
    last_success: Mutex<Instant>,
}

impl Running<'_> {
    fn work(&self) {
        while self.may_go_on() {
            let next = locked(&self.items).pop_front();
            match next {
                Some(Item::Files { data_key, paths, made }) => self.change_files(&data_key, &paths, made),
                Some(Item::Provisioned(name)) => self.change_provisioned(&name),
                None => return,
            }
        }
    }

    /// Without the right to write nobody is asked for what could not be written.
    fn may_go_on(&self) -> bool {
        let lost = self.work.writer.permit().check().err();
        if let Some(lost) = lost {
            locked(&self.work.failures.first).get_or_insert(lost.into());
        }
        lost.is_none()
    }

    /// All files of one data key. If its records cannot be had, that is so for all of them. One that has another data key by now
    /// gets records of that.
    fn change_files(&self, data_key: &[u8; 16], paths: &[String], made: Option<Vec<Record>>) {
        let mut made = made.map(Ok);
        for path in paths {
            let changed = self.work.files.update(path, self.work.writer, |page| {
                let Some(header) = self.work.ring.authenticate(page)? else { return Ok(None) };
                if Wanted::are_all(self.work.wanted, &header.header().records) {
                    return Ok(None);
                }
                if header.header().data_key_id != *data_key {
                    return Ok(Some(self.work.ring.next_page(page, &header, &self.records(&header)?)?));
                }
                match made.get_or_insert_with(|| self.records(&header)) {
                    Ok(records) => Ok(Some(self.work.ring.next_page(page, &header, records)?)),
                    Err(error) => Err(CliError::with_code(error.code(), error)),
                }
            });
            match changed {
                Ok(()) => _ = self.files.fetch_add(1, Ordering::SeqCst),
                Err(error) => self.work.tell(path, error),
            }
        }
    }

    fn records(&self, header: &AuthenticHeader) -> Result<Vec<Record>, CliError> {
        let old = &header.header().records;
        if self.work.failures.of_keys(old) >= REFUSALS {
            return Err(CliError::new(Exit::KeyRefused, "its key was refused too often: not asked again"));
        }
        let made = self.patiently(|| self.work.ring.rewrapped(header, self.work.wanted));
        self.work.failures.note(old, made.is_err());
        Ok(made?)
    }

    fn change_provisioned(&self, name: &str) {
        let Work { ring, stock, writer, wanted, failures, .. } = self.work;
        let changed = || -> Result<(), CliError> {
            let Some(bytes) = stock.read(name) else { return Ok(()) };
            if let Some(new) = self.patiently(|| ring.rewrapped_provisioned(name, &bytes, wanted))? {
                writer.permit().check()?;
                stock.replace(name, &new).map_err(|error| CliError::io(".kmsfs/keys", &error))?;
            }
            Ok(())
        };
        match changed() {
            Ok(()) => _ = self.provisioned.fetch_add(1, Ordering::SeqCst),
            Err(error) => failures.tell(&format!("the provisioned key {name}"), error),
        }
    }

    /// Waits for a provider that throttles or is away, as long as somebody has success now and then.
    fn patiently<T>(&self, call: impl Fn() -> Result<T, KeyError>) -> Result<T, KeyError> {
        loop {
            match call() {
                Err(error) if error.is_passing() && locked(&self.last_success).elapsed() < PATIENCE => {
                    std::thread::sleep(PAUSE);
                }
                Err(error) => return Err(error),
                Ok(made) => {
                    *locked(&self.last_success) = Instant::now();
                    return Ok(made);
                }
            }
        }
    }

    fn step(&self) -> Step {
        let done = self.files.load(Ordering::SeqCst) + self.provisioned.load(Ordering::SeqCst);
        Step { text: report::part(done, self.total, "file"), of: Some((done, self.total)) }
    }
}

fn add(a: Missing, b: Missing) -> Missing {
    Missing {
        rewrap: a.rewrap + b.rewrap,
        unwrap: a.unwrap + b.unwrap,
        wrap: a.wrap + b.wrap,
        priced: a.priced + b.priced,
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_the_same_whatever_the_request() {
        let first = reason("KMS ReEncrypt with key k: AccessDenied: no (request id 1-2): ask for kms:ReEncryptFrom");
        assert_eq!(
            first,
            reason("KMS ReEncrypt with key k: AccessDenied: no (request id 3): ask for kms:ReEncryptFrom")
        );
        assert_eq!(reason("no (request id"), "no (request id");
        let failures = Failures::default();
        for n in 0..5 {
            failures.tell("file", CliError::new(Exit::KeyRefused, format_args!("refused (request id {n})")));
        }
        assert_eq!(locked(&failures.reasons).values().collect::<Vec<_>>(), [&5]);
    }
}
