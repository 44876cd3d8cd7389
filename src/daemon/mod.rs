//! This process: what it inherits, hardening, going to the background, logging, signals, what the service manager is told, and the sockets on which a mount answers.
//!
//! Knows nothing of filesystems and keys: what a request or a signal does is a closure of the caller's.

pub mod control;
pub mod detach;
mod hardening;
pub mod http;
pub mod inherited;
mod journal;
pub mod log;
mod log_format;
pub mod notify;
mod own_process;
pub mod own_socket;
pub mod sandbox;
pub mod signals;
mod system_calls;

pub use hardening::{HardenError, harden, take_modes_as_given};
pub use own_process::leave;
