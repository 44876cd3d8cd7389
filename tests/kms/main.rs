//! Keys: those who wrap them, what happens when these fail, and how keys change under a volume.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // how a test fails, and how it tells what it left out or measured

#[path = "../support/mod.rs"]
mod support;

mod aws_kms;
mod check_kms;
mod credentials;
mod key_interleavings;
mod keyring;
mod kms_faults;
mod kms_mount_faults;
mod kms_server;
mod kms_storm;
mod memory;
mod policy;
mod providers;
mod provision;
mod recipients;
mod rekey;
mod rewrap;
mod rewrap_mounted;
mod secrets;
mod tls_and_endpoints;
mod transfer_kms;
