//! The kernel's side: attaching a mount point, speaking the FUSE protocol through `fuser`, and converting types.
//!
//! Nothing is decided here: every method of the adapter is one call of [`crate::fs`]. The core decrypts into a buffer that
//! this module hands it, so another transport can be put beside this one.

mod adapter;
mod attach;
mod attendant;
mod convert;
mod kernel;
mod low_latency;
mod prune;
mod reply;
mod session;
mod table;
mod tuning;
mod wishes;

pub use attach::{MountError, check_rights, remount, unmount};
pub use attendant::{Attendant, attend, is_attendant};
pub use session::{End, Options, serve};
pub use table::{
    Found, Holder, holders, kind_at, mount_at, mounts, mounts_below, options_at, places_of, places_of_device,
};
