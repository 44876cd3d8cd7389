//! One file for each command.

#[cfg(feature = "mount")]
pub(super) mod attend;
pub(super) mod audit;
pub(super) mod cat;
pub(super) mod check;
mod check_config;
mod check_paths;
mod check_report;
pub(super) mod completions;
pub(super) mod copy_trees;
pub(super) mod demo;
pub(super) mod doctor;
mod doctor_create;
mod doctor_host;
mod doctor_keys;
mod doctor_wakes;
pub(super) mod estimate;
mod estimate_walk;
pub(super) mod forget;
mod header_files;
mod header_writer;
pub(super) mod init;
pub(super) mod inspect;
mod inspect_file;
mod inspect_html;
mod inspect_paths;
mod key_change;
mod key_coverage;
mod key_hold;
#[cfg(feature = "mount")]
mod key_reload;
pub(super) mod keys;
mod keys_list;
mod keys_provision;
mod keys_ring;
mod keys_usage;
pub(super) mod lock;
pub(super) mod ls;
pub(super) mod man;
pub(super) mod mount;
mod observe;
mod plain_names;
mod policy;
pub(super) mod recipients;
pub(super) mod rekey;
mod rekey_notes;
#[cfg(feature = "mount")]
mod remount;
pub(super) mod rewrap;
mod rewrap_work;
#[cfg(feature = "mount")]
mod serve;
#[cfg(feature = "mount")]
mod serve_place;
#[cfg(feature = "mount")]
mod serve_watch;
pub(super) mod shred;
pub(super) mod speed;
pub(super) mod status;
pub(super) mod sync;
#[cfg(feature = "mount")]
mod teller;
pub(super) mod top;
mod top_view;
mod tree_totals;
pub(super) mod umount;
mod unmounted;
