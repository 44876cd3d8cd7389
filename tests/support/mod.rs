//! Servers, volumes and documents that tests share. Every test program includes all of it, and uses a part.
#![allow(dead_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout)] // how a test fails, and how it tells what it left out

pub(crate) mod aws_account;
pub(crate) mod booted;
pub(crate) mod document;
pub(crate) mod fake_kms;
pub(crate) mod fault_proxy;
pub(crate) mod isolated;
pub(crate) mod kms_mount;
pub(crate) mod kms_server;
pub(crate) mod library;
pub(crate) mod memory_scan;
pub(crate) mod ministack;
pub(crate) mod moto;
mod mount;
pub(crate) mod refusal;

#[allow(unused_imports)]
pub(crate) use self::mount::*;
