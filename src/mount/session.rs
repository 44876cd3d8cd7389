//! One mount from attaching to the end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuser::{Config, Session, SessionACL};

use serde::{Deserialize, Serialize};

use crate::fs::Filesystem;

use super::adapter::Adapter;
use super::attach::MountError;
use super::attendant::Attendant;
use super::kernel::MountedKernel;
use super::low_latency::LowLatency;
use super::prune::Prune;

/// How a volume is mounted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    /// Where; an absolute path. Any bytes can be in it, so it is never a part of a text.
    #[serde(skip)]
    pub mountpoint: PathBuf,
    /// What is shown as the mount's source.
    pub source: String,
    /// The kernel refuses all changes.
    pub read_only: bool,
    /// Other users may use the mount, as far as modes allow them.
    pub allow_other: bool,
    /// Set-id bits count.
    pub suid: bool,
    /// Device nodes work.
    pub dev: bool,
    /// Programs can be run.
    pub exec: bool,
    /// Access times are left alone.
    pub noatime: bool,
    /// No CPU sleeps while requests follow each other closely.
    pub low_latency: bool,
    /// More flags of mount(2), for the kernel alone.
    pub vfs: u32,
    /// Threads that serve the kernel.
    pub threads: usize,
}

impl Default for Options {
    /// Read-write for the mounting user, without set-id bits and devices, four threads.
    fn default() -> Self {
        Self {
            mountpoint: PathBuf::new(),
            source: "kmsfs".to_owned(),
            read_only: false,
            allow_other: false,
            suid: false,
            dev: false,
            exec: true,
            noatime: false,
            low_latency: false,
            vfs: 0,
            threads: 4,
        }
    }
}

/// How a session ends. Whoever sends it ends the session, also while programs in another mount namespace have the mount: what
/// they do from then on fails.
pub type End = io::Result<()>;

/// How long the threads that serve may take to start.
const START: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_micros(200);

/// Has `fs` mounted by `attendant`, calls `ready` once every thread serves and a request has been answered, and returns when
/// the mount was unmounted.
///
/// # Errors
/// [`MountError`]; nothing stays mounted then.
pub fn serve(
    fs: Arc<Filesystem>,
    options: &Options,
    attendant: &Attendant,
    (end, ended): (Sender<End>, &Receiver<End>),
    ready: impl FnOnce(&str),
) -> Result<(), MountError> {
    let latency = if options.low_latency { Some(LowLatency::new(attendant.latency_device()?)?) } else { None };
    let (device, name) = attendant.attach()?;
    let prune = Prune::new(device.try_clone()?);
    let (threads, writes_back) = (options.threads.max(1), Arc::new(AtomicBool::new(false)));
    let mut config = Config::default();
    config.n_threads = Some(threads);
    let adapter = Adapter::new(Arc::clone(&fs), latency, Arc::clone(&writes_back));
    // The kernel itself keeps other users out unless `allow_other` is set. The check that fuser would add refuses what the
    // kernel does in the background on nobody's behalf.
    let session = match Session::from_fd(adapter, device, SessionACL::All, config) {
        Ok(session) => session,
        Err(error) => {
            let _ = attendant.detach(true);
            return Err(error.into());
        }
    };
    // The session has begun, and nothing is answered yet.
    let writes_back = writes_back.load(Ordering::Relaxed);
    fs.connect(Box::new(MountedKernel { notifier: session.notifier(), prune, threads, writes_back }));
    let session = thread::Builder::new().name("session".to_owned()).spawn(move || {
        let result = session.run();
        // Nobody listens where somebody else has ended it.
        drop(end.send(result));
    });
    let session = session.inspect_err(|_| drop(attendant.detach(true)))?;
    if serves(&session, options) {
        attendant.lift_limits();
        ready(&name);
    } else {
        let _ = attendant.detach(true);
    }
    ended.recv().map_err(|_| io::Error::other("the thread that serves has panicked"))?.map_err(MountError::from)
}

/// Waits until every thread of `session` is there and one has answered; false if that does not come about.
fn serves(session: &JoinHandle<()>, options: &Options) -> bool {
    let until = Instant::now() + START;
    while !session.is_finished() && Instant::now() < until {
        if serving_threads().is_ok_and(|threads| threads >= options.threads.max(1)) {
            return rustix::fs::statvfs(&options.mountpoint).is_ok();
        }
        thread::sleep(PAUSE);
    }
    false
}

/// How many threads of this process are called as fuser calls those that serve.
fn serving_threads() -> io::Result<usize> {
    let names = std::fs::read_dir("/proc/self/task")?.map(|task| std::fs::read(task?.path().join("comm")));
    Ok(names.filter(|name| name.as_ref().is_ok_and(|name| name.starts_with(b"fuser-"))).count())
}
