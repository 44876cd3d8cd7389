//! The process that attaches and detaches a mount point for the one that serves it; nobody else calls it.

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

use crate::mount;

/// Attends if this process was started for that; returns when it is done.
pub(crate) fn run_if_asked() -> Option<ExitCode> {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let (_, rest) = arguments.split_first().filter(|(first, _)| mount::is_attendant(first))?;
    // Whoever asked sees the end of the conversation; there is nobody else to tell.
    Some(mount::attend(rest).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS))
}
