//! The command line and the documents.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // how a test fails, and how it tells what it left out or measured

#[path = "../support/mod.rs"]
mod support;

mod audit;
mod check;
mod cli;
mod demo;
mod doctor;
mod exit_codes;
mod first_use;
#[cfg(all(feature = "age", feature = "pkcs11"))]
mod guide;
mod inspect;
mod inspect_html;
mod observability;
mod readme;
mod shred;
mod transfer;
