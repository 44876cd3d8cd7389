//! The writer of a header that `kmsfs rewrap` has made: the mount that has the volume for writing, or, where there is none, this
//! process.
//!
//! Invariants: a header is written only over the one that it was made from, and only while the volume is ours, or the mount's, to write.

#[cfg(feature = "mount")]
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use crate::cli::error::{CliError, Exit};
use crate::daemon::control::{Ask, ClientError};
use crate::format::header::HeaderPage;
#[cfg(feature = "mount")]
use crate::fs::{Error, Filesystem};
use crate::lease::Permit;
use crate::storage::CipherDirectory;

use super::{key_hold, status};

/// How long a mount may take for one header, which waits for a file that is just being sealed anew.
const DEADLINE: Duration = Duration::from_secs(600);
/// How long a mount that comes or goes is waited for, and the wait before looking again.
const CHANGE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// The fate of a header.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Written {
    Done,
    /// The file has another one than the one that was looked at.
    Changed,
    /// The file is gone.
    Gone,
    Failed(String),
}

/// The header page in a request, if it is one.
#[cfg(feature = "mount")]
fn page(text: &str) -> Option<HeaderPage> {
    BASE64.decode(text).ok()?.try_into().ok()
}

#[cfg(feature = "mount")]
impl Written {
    /// The mount's side.
    pub(super) fn by(filesystem: &Filesystem, path: &str, judged: &str, new: &str) -> Self {
        let (Some(judged), Some(new)) = (page(judged), page(new)) else {
            return Self::Failed("no header page".to_owned());
        };
        match filesystem.replace_header(path, &judged, &new) {
            Ok(true) => Self::Done,
            Ok(false) => Self::Changed,
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::NotFound => Self::Gone,
            Err(error) => Self::Failed(error.to_string()),
        }
    }
}

/// Writes headers, one at a time.
pub(super) struct HeaderWriter<'a> {
    directory: &'a CipherDirectory,
    /// Where the mount is that writes; none if this process does.
    mount: Option<Mutex<Option<PathBuf>>>,
    permit: Permit,
    /// It has gone, and was waited for.
    is_gone: AtomicBool,
}

impl<'a> HeaderWriter<'a> {
    /// `alone` if no mount writes to the volume, nor will; this process then writes as long as `permit` allows.
    pub(super) fn new(directory: &'a CipherDirectory, alone: bool, permit: Permit) -> Self {
        Self { directory, mount: (!alone).then(Mutex::default), permit, is_gone: AtomicBool::new(false) }
    }

    /// Asked before each change that this process makes.
    pub(super) fn permit(&self) -> &Permit {
        &self.permit
    }

    /// Has the mount put `new` in the place of `judged`, or this process by `directly`.
    pub(super) fn write(
        &self,
        path: &str,
        judged: &HeaderPage,
        new: &HeaderPage,
        directly: impl Fn() -> Result<Written, CliError>,
    ) -> Result<Written, CliError> {
        let Some(mount) = &self.mount else { return directly() };
        let mut mount = mount.lock().unwrap_or_else(PoisonError::into_inner);
        let until = Instant::now() + CHANGE;
        loop {
            if mount.is_none() {
                *mount = key_hold::served(self.directory.path()).into_iter().next();
            }
            let Some(place) = mount.as_ref() else {
                if Instant::now() < until && !self.is_gone.load(Ordering::Relaxed) {
                    std::thread::sleep(PAUSE);
                    continue;
                }
                self.is_gone.store(true, Ordering::Relaxed);
                let gone = CliError::new(Exit::NotMounted, "the volume was unmounted meanwhile");
                return Err(gone.hint("run the command again"));
            };
            let [judged, new] = [judged, new].map(|page| BASE64.encode(page));
            let ask = Ask::Header { path: path.to_owned(), judged, new };
            match status::connect(place).and_then(|client| client.tell(ask, DEADLINE)) {
                Ok(answer) => {
                    return serde_json::from_str(&answer).map_err(|_| {
                        let what = format_args!(
                            "the mount at {} does not know how: it is of another version",
                            place.display()
                        );
                        CliError::new(Exit::Other, what).hint("unmount it and mount it again")
                    });
                }
                // It ends, or has: whether it has written the header is seen by looking again.
                Err(ClientError::NotServed | ClientError::Broken) if Instant::now() < until => {
                    *mount = None;
                    std::thread::sleep(PAUSE);
                }
                Err(error) => return Err(status::failure(place, &error)),
            }
        }
    }
}
