//! Real mounts beside plain directories.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // how a test fails, and how it tells what it left out or measured

#[path = "../support/mod.rs"]
mod support;

mod comparison;
mod differential;
mod mount;
mod mounting;
mod posix;
