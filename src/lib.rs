//! kmsfs: a filesystem that encrypts transparently with keys from a KMS.
//!
//! A cipher directory holds one ciphertext file for each plaintext file. Every file is sealed in pages under its own key,
//! which HKDF makes of a data key that a KMS generated; the wrapped data key lies in the file's header.
//!
//! # Map
//! Data goes down, never back up:
//! ```text
//! kernel -> mount/adapter -> fs/io -> content/{read,write} -> storage/file -> backing file
//! ```
//! The key path meets it once, at open:
//! ```text
//! header bytes -> format/header -> keys/ring -> cache -> flight -> provider
//! ```
//! * [`crypto`]: pure functions over bytes; imports nothing of ours.
//! * [`format`]: bytes to types; imports nothing of ours.
//! * [`storage`]: the backing tree; imports nothing of ours.
//! * [`meter`]: counters for what is done often; imports nothing of ours.
//! * [`keys`]: providers, cache, headers to file keys; imports crypto, format and meter.
//! * [`audit`]: the trail of the uses of wrapping keys; imports keys, crypto and format.
//! * [`content`]: the plaintext view of one sealed file; imports crypto, format and storage.
//! * [`lease`]: who writes a volume that several hosts reach; imports crypto, format and storage.
//! * [`fs`]: what a filesystem means; imports content, keys, lease, storage, format, meter, and the names of crypto's keys.
//! * [`check`]: whether what lies in a cipher directory is whole; imports what fs does, and crypto's names.
//! * [`transfer`]: volumes without a mount, and copying trees out of them and into them; imports fs and what opens one.
//! * `runtime`: threads and their ends; imports nothing of ours, and every room above may import it.
//! * `mount`: the kernel's side; imports fs, decides nothing.
//! * `daemon`: this process; imports neither fs nor keys.
//! * `cli`: arguments, settings, commands; imports everything, and only `main` imports it.
//!
//! `tests/layers.rs` holds these arrows against the sources.

pub mod audit;
pub mod check;
pub mod cli;
pub mod content;
pub mod crypto;
pub mod daemon;
pub mod format;
pub mod fs;
pub mod keys;
pub mod lease;
pub mod meter;
#[cfg(feature = "mount")]
pub mod mount;
mod runtime;
pub mod storage;
pub mod transfer;
