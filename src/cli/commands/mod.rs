//! One file for each command.

#[cfg(feature = "mount")]
pub(super) mod attend;
pub(super) mod check;
mod check_config;
mod check_paths;
mod check_report;
pub(super) mod completions;
pub(super) mod demo;
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
mod inspect_html;
mod key_change;
pub(super) mod keys;
mod keys_list;
mod keys_provision;
pub(super) mod lock;
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
#[cfg(feature = "mount")]
mod serve_answers;
pub(super) mod speed;
pub(super) mod status;
pub(super) mod umount;
