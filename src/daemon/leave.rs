//! How a process ends that has loaded code which is not its own.

use std::io::Write as _;

/// Ends the process with an exit code and without what libraries have registered for its end: another thread may be in their
/// code still, and would find it torn down.
pub fn leave(code: u8) -> ! {
    // A closed pipe at the very end is nothing that anybody could still be told.
    let _ = std::io::stdout().flush();
    #[allow(unsafe_code)] // no safe wrapper of it exists in the crates we use
    // SAFETY: it takes a number and does not come back.
    unsafe {
        libc::_exit(i32::from(code))
    }
}
