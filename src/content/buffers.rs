//! Buffers of the hot path: one disk buffer per thread, reused, and payloads that wipe themselves.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use crate::format::geometry::PAYLOAD_LEN;
use crate::format::page::Payload;

/// A disk buffer that has grown beyond this many bytes is not kept.
const KEEP: usize = 2 * 1024 * 1024;

thread_local! {
    static DISK: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with this thread's buffer of `len` bytes. Its content is ciphertext of an earlier request, or zeros.
pub(super) fn with_disk_buffer<R>(len: usize, work: impl FnOnce(&mut [u8]) -> R) -> R {
    let mut buffer = DISK.take();
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let result = work(&mut buffer[..len]);
    if buffer.len() <= KEEP {
        DISK.set(buffer);
    }
    result
}

/// A page's plaintext, zeros at first, wiped on drop.
pub(super) struct Plain(Box<Payload>);

impl Plain {
    pub(super) fn zeros() -> Self {
        Self(Box::new([0; PAYLOAD_LEN]))
    }

    pub(super) fn copy_of(payload: &Payload) -> Self {
        let mut copy = Self::zeros();
        copy.0.copy_from_slice(payload);
        copy
    }
}

impl Deref for Plain {
    type Target = Payload;

    fn deref(&self) -> &Payload {
        &self.0
    }
}

impl DerefMut for Plain {
    fn deref_mut(&mut self) -> &mut Payload {
        &mut self.0
    }
}

impl Drop for Plain {
    /// A plain fill that the compiler may not leave out: a volatile write of every byte is many times slower.
    fn drop(&mut self) {
        self.0.fill(0);
        std::hint::black_box(&self.0);
    }
}
