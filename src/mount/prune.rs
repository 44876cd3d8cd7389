//! Asking the kernel to drop inodes that nobody uses, by their numbers: `FUSE_NOTIFY_PRUNE`, Linux 6.18.
//!
//! Unlike the notification that makes an entry invalid it needs no lock on the directory, so a kernel that is busy listing a
//! directory can forget what it has listed of it. fuser does not know it, so it is written to the device here.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use crate::fs::InodeId;

/// `FUSE_NOTIFY_PRUNE` in the kernel's `include/uapi/linux/fuse.h`.
const NOTIFY_PRUNE: i32 = 9;
/// Inodes of one message.
const MOST: usize = 500;

/// The device of a mount, as far as this is concerned.
pub(super) struct Prune {
    device: OwnedFd,
    /// The kernel does not know how.
    unknown: AtomicBool,
}

impl Prune {
    pub(super) fn new(device: OwnedFd) -> Self {
        Self { device, unknown: AtomicBool::new(false) }
    }

    /// Has those of the inodes dropped that are not in use; false if the kernel does not know how.
    pub(super) fn drop_unused(&self, inodes: &[InodeId]) -> bool {
        if self.unknown.load(Ordering::Relaxed) {
            return false;
        }
        for inodes in inodes.chunks(MOST) {
            match self.send(inodes) {
                Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                    tracing::debug!("this kernel cannot drop inodes when it is asked to (Linux 6.18 can)");
                    self.unknown.store(true, Ordering::Relaxed);
                    return false;
                }
                // Of a mount that has ended nothing is left to be dropped.
                Err(_) => return true,
                Ok(()) => {}
            }
        }
        true
    }

    fn send(&self, inodes: &[InodeId]) -> io::Result<()> {
        let message = message(inodes);
        match rustix::io::write(&self.device, &message)? {
            written if written == message.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }
}

/// `fuse_out_header` (length, code, 0), `fuse_notify_prune_out` (count, padding, spare), numbers.
fn message(inodes: &[InodeId]) -> Vec<u8> {
    let count = u32::try_from(inodes.len()).unwrap_or(u32::MAX);
    let len = count.saturating_mul(8).saturating_add(32);
    let mut message = Vec::with_capacity(len as usize);
    message.extend_from_slice(&len.to_ne_bytes());
    message.extend_from_slice(&NOTIFY_PRUNE.to_ne_bytes());
    message.extend_from_slice(&0_u64.to_ne_bytes());
    message.extend_from_slice(&count.to_ne_bytes());
    message.extend_from_slice(&[0; 12]);
    inodes.iter().for_each(|inode| message.extend_from_slice(&inode.0.to_ne_bytes()));
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_as_long_as_it_says() {
        for count in [0, 1, MOST] {
            let message = message(&vec![InodeId(7); count]);
            let field = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().unwrap()) as usize;
            assert_eq!((field(0), field(4), field(16), message.len()), (32 + 8 * count, 9, count, 32 + 8 * count));
        }
    }

    #[test]
    fn a_kernel_that_cannot_is_not_asked_again() {
        use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
        // Nothing can be written to a timer: it is refused as an unknown message is.
        let prune = Prune::new(timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::empty()).unwrap());
        assert!(!prune.drop_unused(&[InodeId(1)]) && prune.unknown.load(Ordering::Relaxed));
        // Another failure says nothing of what the kernel knows.
        let prune = Prune::new(std::fs::File::open("/proc/self/status").unwrap().into());
        assert!(prune.drop_unused(&[InodeId(1)]) && !prune.unknown.load(Ordering::Relaxed));
    }
}
