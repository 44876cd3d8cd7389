//! One file for each command.

pub(super) mod cat;
pub(super) mod check;
mod check_config;
mod check_paths;
mod check_report;
pub(super) mod completions;
pub(super) mod copy_trees;
pub(super) mod doctor;
mod doctor_host;
mod doctor_keys;
pub(super) mod estimate;
mod estimate_walk;
pub(super) mod forget;
mod header_files;
pub(super) mod init;
pub(super) mod inspect;
mod inspect_file;
mod key_change;
pub(super) mod keys;
mod keys_list;
mod keys_provision;
mod keys_ring;
mod keys_usage;
pub(super) mod lock;
pub(super) mod ls;
pub(super) mod man;
pub(super) mod mount;
mod policy;
pub(super) mod recipients;
#[cfg(feature = "mount")]
mod remount;
pub(super) mod rewrap;
mod rewrap_work;
#[cfg(feature = "mount")]
mod serve;
pub(super) mod shred;
pub(super) mod speed;
pub(super) mod status;
pub(super) mod umount;
mod unmounted;
