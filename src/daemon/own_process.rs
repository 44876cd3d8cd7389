//! What a process does to itself through calls that have no safe wrapper in the crates we use.

#![allow(unsafe_code)]

use std::fs;
use std::io::{self, Write as _};
use std::mem::MaybeUninit;
use std::ptr;

/// Ends the process with an exit code and without what libraries have registered for its end: another thread may be in their
/// code still, and would find it torn down.
pub fn leave(code: u8) -> ! {
    // A closed pipe at the very end is nothing that anybody could still be told.
    let _ = io::stdout().flush();
    // SAFETY: it takes a number and does not come back.
    unsafe { libc::_exit(i32::from(code)) }
}

/// Keeps every descriptor but standard input, output and error from programs that this process starts.
pub(super) fn close_at_exec() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(number) = number.filter(|number| *number > libc::STDERR_FILENO) else { continue };
        // SAFETY: it takes numbers and closes nothing.
        unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// Lets this thread, and the threads and programs that it starts, have every signal.
pub(super) fn unblock_signals() {
    let mut none = MaybeUninit::uninit();
    // SAFETY: the first call fills the set that the second one reads; a null pointer asks for no old set.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
    }
}
