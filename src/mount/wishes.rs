//! What the kernel is asked for when a session begins.

use fuser::{InitFlags, KernelConfig};

/// Bytes of a request at most: the largest below the kernel's own limit of a megabyte that ends where a page of the file does
/// (256 of them are 253 of the kernel's). A stream of them writes no page twice.
pub(super) const MAX_REQUEST: u32 = 253 * 4096;
/// Requests that the kernel may have under way in the background.
const MAX_BACKGROUND: u16 = 64;
/// What the kernel is asked for, as far as it has it.
///
/// `HANDLE_KILLPRIV_V2`: set-id bits and file capabilities are dropped here, so that the kernel need not ask for them before
/// every write. `ASYNC_DIO` is not asked for: the kernel drops cached pages before such a write, and not those that come while it
/// is under way. `DONT_MASK`: a default ACL takes the place of the umask, so that is applied here too.
const WANTED: [InitFlags; 8] = [
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_NO_EXPORT_SUPPORT,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_DONT_MASK,
];

/// Tells the kernel; returns whether it has a writeback cache for those that `writes`.
pub(super) fn tell(config: &mut KernelConfig, xattrs: bool, writes: bool) -> bool {
    let acls = xattrs.then_some(InitFlags::FUSE_POSIX_ACL);
    for flag in WANTED.into_iter().chain(acls) {
        if config.add_capabilities(flag).is_err() {
            tracing::debug!("the kernel does not offer {flag:?}");
        }
    }
    // It takes less where it must.
    let _ = config.set_max_write(MAX_REQUEST);
    let _ = config.set_max_background(MAX_BACKGROUND);
    writes && config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `docs/FORMAT.md`: a page of 4096 bytes on the disk holds 4048.
    #[test]
    fn the_largest_request_ends_with_a_page() {
        assert_eq!((MAX_REQUEST % 4048, MAX_REQUEST % 4096), (0, 0));
        assert!(
            (0..=1024 * 1024 - MAX_REQUEST).skip(1).all(|more| !(MAX_REQUEST + more).is_multiple_of(4048 * 4096 / 16))
        );
    }
}
