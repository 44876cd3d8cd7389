//! Wiping the stack that a computation with keys has used: ciphers and hashes keep keys and what they expand them to in
//! their frames, where they would stay until something else happens to be as deep.

use std::hint::black_box;

/// Deeper than any computation here goes; measured by the search in `tests/kms/memory.rs`.
const DEPTH: usize = 12 * 1024;

/// What `work` returns, which should be small and hold a secret behind a pointer only: it is moved through frames that
/// nobody wipes.
#[inline(never)]
pub(crate) fn wiped<T>(work: impl FnOnce() -> T) -> T {
    let result = apart(work);
    wipe();
    result
}

/// In a frame of its own, so that its end is the end of what `work` put on the stack.
#[inline(never)]
fn apart<T>(work: impl FnOnce() -> T) -> T {
    work()
}

/// Where the frames of [`apart`] were. One fill that the compiler may not leave out.
#[inline(never)]
fn wipe() {
    let mut frames = [0_u8; DEPTH];
    black_box(&mut frames);
}
