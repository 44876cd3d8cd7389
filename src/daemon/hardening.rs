//! What keeps this process's memory out of files and other processes, and what a process that serves a mount needs.

use std::env;
use std::io;

use rustix::fs::Mode;
use rustix::process::{DumpableBehavior, Resource, Rlimit};

/// With this variable set the AWS SDK writes keys into its log.
const LEAKS_KEYS: &str = "LOG_SENSITIVE_BODIES";

/// Why the process does not go on.
#[derive(Debug, thiserror::Error)]
pub enum HardenError {
    /// The environment asks a library to log keys.
    #[error("{LEAKS_KEYS} is set: it would write keys into the log")]
    LeaksKeys,
    /// The kernel refused.
    #[error("core dumps and debuggers cannot be turned off: {0}")]
    Refused(#[from] io::Error),
}

/// Keeps secrets in this process: no core dumps, no debuggers and no reading of its memory by other processes of the same
/// user, no logging of keys.
///
/// # Errors
/// [`HardenError`].
pub fn harden() -> Result<(), HardenError> {
    refuse_leaks(env::var_os(LEAKS_KEYS).is_some())?;
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(io::Error::from)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(io::Error::from)?;
    Ok(())
}

fn refuse_leaks(asked: bool) -> Result<(), HardenError> {
    if asked { Err(HardenError::LeaksKeys) } else { Ok(()) }
}

/// Takes the mode of a new file as it is given: the kernel has applied the umask of whoever makes the file.
pub fn take_modes_as_given() {
    rustix::process::umask(Mode::empty());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardens() {
        harden().unwrap();
        assert_eq!(rustix::process::getrlimit(Resource::Core).current, Some(0));
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    }

    #[test]
    fn refuses_to_log_keys() {
        assert!(matches!(refuse_leaks(true), Err(HardenError::LeaksKeys)));
    }
}
