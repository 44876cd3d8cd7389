//! A mount among its surroundings: service managers, disks that fail, kills, and programs as people use them.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // how a test fails, and how it tells what it left out or measured

#[path = "../support/mod.rs"]
mod support;

mod applications;
mod backing_fs_failures;
mod kills;
mod lost_writes;
mod power_cuts;
mod services;
mod systemd;
mod systemd_booted;
