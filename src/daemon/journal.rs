//! The journal of systemd, by its native protocol: each event is one datagram of fields, with its priority and its time.
//!
//! Invariants:
//! * the socket is connected when the log begins: a process that later gives up most files still reaches it;
//! * a journal that does not take a line holds nobody up for longer than [`PATIENCE`]; how many lines are missing is told by
//!   the first that it takes again;
//! * fields of an event begin with `KMSFS_`, so that none takes the place of one that has a meaning already.

use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::log_format::priority;

/// Where the journal listens.
const SOCKET: &str = "/run/systemd/journal/socket";
/// How long a line may wait for room in the journal's queue.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest value of a field, so that every event fits a datagram.
const MAX_VALUE: usize = 32 * 1024;
/// The longest name of a field that the journal takes.
const MAX_NAME: usize = 64;
/// Fields of one event at most.
const MAX_FIELDS: usize = 4;

/// A connection to the journal.
pub(super) struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
    /// Lines that it did not take since the last one that it took.
    missing: AtomicU64,
}

impl Journal {
    /// Connects to the journal of this system.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn connect() -> io::Result<Self> {
        Self::at(Path::new(SOCKET))
    }

    fn at(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        socket.connect(path)?;
        Ok(Self { socket, path: path.to_owned(), missing: AtomicU64::new(0) })
    }

    fn send(&self, entry: &[u8]) {
        let missing = self.missing.swap(0, Ordering::Relaxed);
        if missing > 0 && self.try_to_send(&missed(missing)).is_err() {
            self.missing.fetch_add(missing + 1, Ordering::Relaxed);
        } else if self.try_to_send(entry).is_err() {
            self.missing.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn try_to_send(&self, entry: &[u8]) -> io::Result<()> {
        match self.socket.send(entry) {
            // The socket was made anew, which is rare: it outlives restarts of the journal.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotConnected) => {
                self.socket.connect(&self.path)?;
                self.socket.send(entry).map(drop)
            }
            other => other.map(drop),
        }
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut entry = Entry::new(priority(*metadata.level()), &[fields.message, fields.shown].concat());
        entry.put("KMSFS_TARGET", metadata.target());
        for (name, value) in fields.named {
            entry.put(&name, &value);
        }
        self.send(&entry.0);
    }
}

fn missed(lines: u64) -> Vec<u8> {
    let mut entry = Entry::new(4, &format!("{lines} lines of this log were not taken by the journal in time"));
    entry.put("KMSFS_MISSING_LINES", &lines.to_string());
    entry.0
}

/// The fields of one entry, as the journal reads them.
struct Entry(Vec<u8>);

impl Entry {
    fn new(priority: u8, message: &str) -> Self {
        let mut entry = Self(Vec::with_capacity(512));
        entry.put("PRIORITY", &priority.to_string());
        entry.put("SYSLOG_IDENTIFIER", "kmsfs");
        entry.put("MESSAGE", message);
        entry
    }

    /// One line, or with its length before it, since a value may hold line breaks.
    fn put(&mut self, name: &str, value: &str) {
        let value = &value[..value.floor_char_boundary(MAX_VALUE)];
        self.0.extend_from_slice(name.as_bytes());
        if value.contains('\n') {
            self.0.push(b'\n');
            self.0.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            self.0.push(b'=');
        }
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(b'\n');
    }
}

/// What an event says: its message, and its fields both as people read them and each by its name.
#[derive(Default)]
struct Fields {
    message: String,
    shown: String,
    named: Vec<(String, String)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: String) {
        if field.name() == "message" {
            self.message = value;
            return;
        }
        // Writing to a string does not fail.
        let _ = write!(self.shown, " {}={value}", field.name());
        if self.named.len() < MAX_FIELDS {
            self.named.push((name_of(field.name()), value));
        }
    }
}

fn name_of(field: &str) -> String {
    let letters = field.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    "KMSFS_".chars().chain(letters).take(MAX_NAME).collect()
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;
    use tracing_subscriber::layer::SubscriberExt;

    /// What arrives of the events of `body`, each as its fields in order.
    fn received(body: impl FnOnce()) -> Vec<Vec<u8>> {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        let journal = UnixDatagram::bind(&path).unwrap();
        journal.set_nonblocking(true).unwrap();
        let subscriber = tracing_subscriber::registry().with(Journal::at(&path).unwrap());
        tracing::subscriber::with_default(subscriber, body);
        let mut buffer = vec![0; 256 * 1024];
        std::iter::from_fn(|| journal.recv(&mut buffer).ok().map(|len| buffer[..len].to_vec())).collect()
    }

    #[test]
    fn an_event_is_one_entry_with_its_fields() {
        let entries = received(|| tracing::warn!(request_id = "id-1", count = 3, "refused"));
        let [entry] = &entries[..] else { panic!("{} entries", entries.len()) };
        let text = std::str::from_utf8(entry).unwrap();
        let lines: Vec<_> = text.lines().filter(|line| !line.starts_with("KMSFS_TARGET=")).collect();
        let expected = ["PRIORITY=4", "SYSLOG_IDENTIFIER=kmsfs", "MESSAGE=refused request_id=id-1 count=3"];
        assert_eq!(lines, [&expected[..], &["KMSFS_REQUEST_ID=id-1", "KMSFS_COUNT=3"]].concat());
        assert!(text.contains("\nKMSFS_TARGET=kmsfs::daemon::journal"), "{text}");
    }

    #[test]
    fn a_line_break_begins_no_field_and_no_value_is_too_long() {
        let entries = received(|| {
            tracing::error!("one\nPRIORITY=7");
            tracing::error!("{}", "ä".repeat(MAX_VALUE));
        });
        let length = u64::try_from("one\nPRIORITY=7".len()).unwrap().to_le_bytes();
        let framed = [b"MESSAGE\n", &length[..], b"one\nPRIORITY=7\n"].concat();
        assert!(entries[0].windows(framed.len()).any(|window| window == framed));
        assert!(entries[1].len() > MAX_VALUE && entries[1].len() < MAX_VALUE + 200, "{}", entries[1].len());
    }

    #[test]
    fn a_journal_that_takes_nothing_holds_nobody_up_and_hears_of_it() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        let receiver = UnixDatagram::bind(&path).unwrap();
        receiver.set_nonblocking(true).unwrap();
        let journal = Journal::at(&path).unwrap();
        let entry = Entry::new(6, "line").0;
        let started = Instant::now();
        while journal.missing.load(Ordering::Relaxed) == 0 {
            journal.send(&entry);
            assert!(started.elapsed() < PATIENCE * 10, "the queue never fills");
        }
        let mut buffer = [0; 1024];
        while receiver.recv(&mut buffer).is_ok() {}
        journal.send(&entry);
        let len = receiver.recv(&mut buffer).unwrap();
        let told = String::from_utf8_lossy(&buffer[..len]).into_owned();
        assert!(told.contains("MESSAGE=1 lines of this log") && told.contains("KMSFS_MISSING_LINES=1\n"), "{told}");
        let len = receiver.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..len], entry);
    }

    #[test]
    fn a_journal_whose_socket_was_made_anew_is_found_again() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        let first = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::at(&path).unwrap();
        drop(first);
        std::fs::remove_file(&path).unwrap();
        let second = UnixDatagram::bind(&path).unwrap();
        journal.send(b"MESSAGE=found\n");
        let mut buffer = [0; 64];
        assert_eq!(second.recv(&mut buffer).unwrap(), b"MESSAGE=found\n".len());
        Journal::at(&home.path().join("none")).err().unwrap();
    }
}
