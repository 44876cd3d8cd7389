//! From uses of keys to lines: threads that use keys put them into a queue, one thread writes it out.
//!
//! Invariants: the queue's lock is never held across I/O; the queue is bounded, and what does not fit is counted; a record is
//! in the chain only once its whole line was given to the kernel.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::crypto::AuditKey;
use crate::keys::{KeyUse, KeyUses, ProviderError, not_recorded};

use super::file::LogFile;
use super::record::{Event, Head, Line, Use};

/// Uses that wait to be written at most.
const MOST_WAITING: usize = 16_384;
/// Records in one write at most.
const BATCH: usize = 512;
/// After a failure the next attempt comes so much later.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest that a key waits for its record, if it must.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// The longest that the end of a mount waits for the last records.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// Why a log cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// The last record is not of this volume.
    #[error("the audit log {0} is not of this volume, or its last record was changed")]
    OtherVolume(std::path::PathBuf),
    /// It cannot be written.
    #[error("the audit log {path} cannot be written: {error}")]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// How a log fares.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditStatus {
    /// The file.
    pub file: String,
    /// Keys are used only if that is recorded.
    pub required: bool,
    /// The number of the last record.
    pub records: u64,
    /// The hash of its line: whoever notes it down can tell later whether the log was cut off before it.
    pub head: String,
    /// Uses that wait to be written.
    pub waiting: u64,
    /// Uses that are in no record.
    pub lost: u64,
    /// Attempts to write that failed.
    pub failures: u64,
    /// Why it cannot be written now.
    pub failing: Option<String>,
}

/// A trail of key uses. Until [`Self::begin`] it only collects them.
pub struct AuditTrail {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    required: bool,
    state: Mutex<State>,
    /// There is something to write, or it is over.
    work: Condvar,
    /// Something was written, or could not be.
    done: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<KeyUse>,
    /// Of the first that waits: uses are numbered as they come.
    first: u64,
    /// Not in any record, and of these those that no record tells of yet.
    lost: u64,
    untold: u64,
    failures: u64,
    failing: Option<String>,
    began: bool,
    over: bool,
    /// Nothing more will be written.
    ended: bool,
    file: String,
    head: Option<Head>,
}

impl AuditTrail {
    /// A trail; `required` says that a key must not be given out before its use is on the disk.
    #[must_use]
    pub fn new(required: bool) -> Self {
        let shared = Shared { required, state: Mutex::default(), work: Condvar::new(), done: Condvar::new() };
        Self { shared: Arc::new(shared), writer: Mutex::new(None) }
    }

    /// What providers note their calls in.
    #[must_use]
    pub fn uses(&self) -> Arc<dyn KeyUses> {
        self.shared.clone()
    }

    /// Goes on with the log in `file`, authenticated with the volume's `key`. What was noted before is on the disk when this
    /// returns.
    ///
    /// # Errors
    /// [`BeginError`].
    pub fn begin(&self, file: LogFile, key: Arc<AuditKey>, volume_id: &str) -> Result<(), BeginError> {
        let path = file.path().to_owned();
        let head = match file.last_line() {
            [] => Head::start(),
            line => match Line::parse(line) {
                Some(line) if line.is_authentic(&key) => Head { seq: line.record.seq, link: line.link() },
                _ => return Err(BeginError::OtherVolume(path)),
            },
        };
        let mut writer = Writer { file, key, head };
        let begin = Event::Begin {
            volume: volume_id.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            torn: writer.file.torn(),
        };
        let failed = |error| BeginError::Io { path: path.clone(), error };
        writer.write(vec![(SystemTime::now(), begin)]).map_err(|(_, error)| failed(error))?;
        let first: Vec<_> = self.shared.state().waiting.drain(..).collect();
        let count = first.len() as u64;
        writer.write(events(&first)).map_err(|(_, error)| failed(error))?;
        let mut state = self.shared.state();
        (state.began, state.first) = (true, state.first + count);
        (state.file, state.head) = (path.display().to_string(), Some(writer.head.clone()));
        drop(state);
        let shared = Arc::clone(&self.shared);
        let spawned = std::thread::Builder::new().name("kmsfs-audit".to_owned()).spawn(move || shared.run(&mut writer));
        *self.writer.lock().unwrap_or_else(PoisonError::into_inner) = Some(spawned.map_err(failed)?);
        Ok(())
    }

    /// Writes what is left and the end. Nothing may be noted after it.
    pub fn end(&self) {
        let mut state = self.shared.state();
        state.over = true;
        self.shared.work.notify_all();
        if !state.began {
            return;
        }
        let waited = self.shared.done.wait_timeout_while(state, LAST_WAIT, |state| !state.ended);
        let ended = waited.unwrap_or_else(PoisonError::into_inner).0.ended;
        match self.writer.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(writer) if ended => drop(writer.join()),
            _ => {}
        }
    }

    /// How it fares.
    #[must_use]
    pub fn status(&self) -> AuditStatus {
        let state = self.shared.state();
        AuditStatus {
            file: state.file.clone(),
            required: self.shared.required,
            records: state.head.as_ref().map_or(0, |head| head.seq),
            head: state.head.as_ref().map(|head| head.link.clone()).unwrap_or_default(),
            waiting: state.waiting.len() as u64,
            lost: state.lost,
            failures: state.failures,
            failing: state.failing.clone(),
        }
    }
}

impl KeyUses for Shared {
    fn check(&self) -> Result<(), ProviderError> {
        if !self.required {
            return Ok(());
        }
        let state = self.state();
        match &state.failing {
            Some(why) => Err(not_recorded(why)),
            None if state.waiting.len() >= MOST_WAITING => Err(not_recorded("too many records wait to be written")),
            None => Ok(()),
        }
    }

    fn note(&self, key_use: KeyUse) -> Result<(), ProviderError> {
        let mut state = self.state();
        if state.waiting.len() >= MOST_WAITING {
            state.lost += 1;
            state.untold += 1;
            let said = if self.required { Err(not_recorded("too many records wait to be written")) } else { Ok(()) };
            return said;
        }
        let number = state.first + state.waiting.len() as u64;
        state.waiting.push_back(key_use);
        self.work.notify_one();
        if !self.required || !state.began {
            return Ok(());
        }
        let waits = |state: &mut State| state.first <= number && state.failing.is_none();
        let waited = self.done.wait_timeout_while(state, LONGEST_WAIT, waits);
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match &state.failing {
            // Whether what was written just before is durable cannot be told.
            Some(why) => Err(not_recorded(why)),
            None if state.first > number => Ok(()),
            None => Err(not_recorded("the disk of the audit log is too slow")),
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, writer: &mut Writer) {
        loop {
            let idle = |state: &mut State| {
                state.waiting.is_empty() && state.untold == 0 && state.failing.is_none() && !state.over
            };
            let state = self.work.wait_while(self.state(), idle).unwrap_or_else(PoisonError::into_inner);
            let batch: Vec<_> = state.waiting.iter().take(BATCH).cloned().collect();
            let (untold, last) = (state.untold, state.over && batch.len() == state.waiting.len());
            drop(state);
            let mut all = events(&batch);
            let now = SystemTime::now();
            if untold > 0 {
                all.push((now, Event::Lost { count: untold, why: "the log could not be written".to_owned() }));
            }
            if last {
                all.push((now, Event::End {}));
            }
            if all.is_empty() {
                // It could not be written: a record shows whether it can.
                all.push((now, Event::Resumed { torn: 0 }));
            }
            let kept_all = all.len();
            let written = writer.write(all);
            let kept = written.as_ref().err().map_or(kept_all, |(kept, _)| *kept);
            self.take_off(kept.min(batch.len()), if kept > batch.len() { untold } else { 0 }, &writer.head);
            let over = match written {
                Ok(()) => self.succeeded(writer, last),
                Err((_, error)) => self.failed(writer, &error),
            };
            if over {
                return;
            }
        }
    }

    /// Takes what is in the log out of the queue.
    fn take_off(&self, uses: usize, told: u64, head: &Head) {
        let mut state = self.state();
        state.waiting.drain(..uses);
        state.first += uses as u64;
        state.untold -= told;
        state.head = Some(head.clone());
    }

    /// Wakes those who wait for their records; returns whether it is over.
    fn succeeded(&self, writer: &Writer, last: bool) -> bool {
        let mut state = self.state();
        let recovered = state.failing.take().is_some();
        state.ended = last;
        self.done.notify_all();
        drop(state);
        if recovered {
            tracing::info!("the audit log {} can be written again", writer.file.path().display());
        }
        last
    }

    /// Tells those who wait, and pauses; returns whether it is over.
    fn failed(&self, writer: &Writer, error: &io::Error) -> bool {
        let mut state = self.state();
        state.failures += 1;
        let first = state.failing.replace(error.to_string()).is_none();
        state.ended = state.over;
        let (over, waiting) = (state.over, state.waiting.len());
        self.done.notify_all();
        drop(state);
        let path = writer.file.path().display();
        if over {
            tracing::error!("the audit log {path} ends without its last records ({waiting}): {error}");
        } else if first {
            tracing::error!("the audit log {path} cannot be written; uses of keys wait to be recorded: {error}");
        }
        if !over {
            self.pause();
        }
        over
    }

    fn pause(&self) {
        let until = Instant::now() + PAUSE;
        let mut state = self.state();
        while !state.over && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            state = self.work.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What there is to write of uses.
fn events(uses: &[KeyUse]) -> Vec<(SystemTime, Event)> {
    uses.iter().map(|key_use| (key_use.at, Event::Use(Box::new(Use::of(key_use))))).collect()
}

struct Writer {
    file: LogFile,
    key: Arc<AuditKey>,
    head: Head,
}

impl Writer {
    /// Writes records; the chain goes on after those whose lines are in the file. An error says how many those are, and that
    /// they may not be durable.
    fn write(&mut self, mut events: Vec<(SystemTime, Event)>) -> Result<(), (usize, io::Error)> {
        let begins = matches!(events.first(), Some((_, Event::Begin { .. })));
        let resumed = self.file.torn() > 0 && !begins;
        if resumed {
            events.insert(0, (SystemTime::now(), Event::Resumed { torn: self.file.torn() }));
        }
        if events.is_empty() {
            return Ok(());
        }
        let (mut lines, mut heads) = (Vec::new(), Vec::new());
        let mut head = self.head.clone();
        for (time, event) in events {
            lines.extend(head.seal(time, event, &self.key));
            heads.push((lines.len(), head.clone()));
        }
        let appended = self.file.append(&lines, self.head.seq + 1);
        let kept = appended.as_ref().err().map_or(lines.len(), |failure| failure.kept);
        let whole = heads.iter().take_while(|(end, _)| *end <= kept).count();
        if let Some((_, head)) = whole.checked_sub(1).and_then(|last| heads.get(last)) {
            self.head = head.clone();
        }
        appended.map_err(|failure| (whole.saturating_sub(usize::from(resumed)), failure.error))
    }
}
