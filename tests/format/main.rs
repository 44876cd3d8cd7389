//! Volumes as they are stored: what the program reads and writes, against other implementations, earlier releases and any bytes.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // how a test fails, and how it tells what it left out or measured

#[path = "../support/mod.rs"]
mod support;

#[cfg(feature = "mount")]
mod compat;
#[cfg(feature = "mount")]
mod decrypt;
mod fuzz_corpus;
mod vectors;
