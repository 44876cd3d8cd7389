//! What a process that serves a mount inherits from whoever starts it and sets aside: descriptors, limits, signals that are
//! blocked or ignored. They are of a shell or a job, and the mount is for everybody.
//!
//! Invariant: a limit that is met is an error of the call that meets it, or is told before it ends the process.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGCHLD, SIGXFSZ};

use super::own_process;

/// Limits that are lifted as far as this user may: the first ends files, the second the process; the next two end memory.
const LIFTED: [Resource; 6] =
    [Resource::Fsize, Resource::Cpu, Resource::As, Resource::Data, Resource::Nproc, Resource::Memlock];

/// Why the process does not go on.
#[derive(Debug, thiserror::Error)]
pub enum InheritedError {
    /// Memory for the threads that serve the mount is not to be had.
    #[error("{0} bytes of memory for the threads that serve the mount are not to be had (`ulimit -v`, `ulimit -d`)")]
    Memory(usize),
    /// The kernel refused.
    #[error("what was inherited cannot be set aside: {0}")]
    Refused(#[from] io::Error),
}

/// Sets it aside, for a process that needs `memory` bytes at once. Returns what stays, in words.
///
/// # Errors
/// [`InheritedError`].
pub fn set_aside(memory: usize) -> Result<Vec<String>, InheritedError> {
    own_process::close_at_exec()?;
    own_process::unblock_signals();
    // A signal with a handler is not ignored, and a program that is started has none of ours. Without the first the end of a
    // child is lost; with the second a limit is an error of the call that meets it.
    for signal in [SIGCHLD, SIGXFSZ] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    let files = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files });
    let [size, seconds, addresses, data, ..] = LIFTED.map(lift);
    if addresses.or(data).is_some() {
        Vec::<u8>::new().try_reserve_exact(memory).map_err(|_| InheritedError::Memory(memory))?;
    }
    let size = size.map(|size| format!("files on the mount end at {size} bytes: this user cannot lift `ulimit -f`"));
    let end =
        seconds.map(|limit| format!("the mount ends after {limit} s of CPU time: this user cannot lift `ulimit -t`"));
    Ok(size.into_iter().chain(end).collect())
}

/// Lifts a limit as far as this user may; returns what is left of it.
fn lift(resource: Resource) -> Option<u64> {
    let limit = getrlimit(resource);
    limit.current?;
    let highest = [Rlimit { current: None, maximum: None }, Rlimit { current: limit.maximum, ..limit }];
    let lifted = highest.into_iter().find(|limit| setrlimit(resource, *limit).is_ok());
    lifted.unwrap_or(limit).current
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_lifted_as_far_as_it_goes() {
        let before = getrlimit(Resource::Nofile);
        let low = Rlimit { current: Some(64), ..before };
        setrlimit(Resource::Memlock, Rlimit { current: Some(4096), ..getrlimit(Resource::Memlock) }).unwrap();
        setrlimit(Resource::Nofile, low).unwrap();
        set_aside(1 << 20).unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current, before.maximum);
        assert_eq!(getrlimit(Resource::Memlock).current, getrlimit(Resource::Memlock).maximum);
    }
}
