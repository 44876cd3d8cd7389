//! The filesystem through the library, without a kernel.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // how a test fails, and how it tells what it left out or measured

#[path = "../support/mod.rs"]
mod support;

mod crash_names;
mod filesystem;
mod key_model;
mod tampering;
