//! What `kmsfs status` shows.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fs::caller::Caller;
use crate::fs::filesystem::Filesystem;
use crate::fs::metrics::{Begun, Metrics, Operation, OperationCounts};

/// A volume's state at one moment. Counts are since the mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// The volume's id.
    pub volume_id: String,
    /// Where its ciphertext lies.
    pub cipher_directory: String,
    /// What seals new files.
    pub suite: String,
    /// Nothing can be changed.
    pub read_only: bool,
    /// Bytes in a block of the backing filesystem; with fewer than 4096 a power cut can tear a page.
    pub backing_block_size: u64,
    /// The provider and key that wrap new data keys.
    pub wrapping_key: String,
    /// Further keys that wrap new data keys too.
    #[serde(default)]
    pub further_recipients: Vec<String>,
    /// How many new files may share a data key.
    pub files_per_data_key: u32,
    /// Openings whose data key was in memory.
    pub key_cache_hits: u64,
    /// Openings that needed a provider.
    pub key_cache_misses: u64,
    /// Unwrapped data keys in memory.
    pub key_cache_entries: u64,
    /// What keys are in: secret memory, locked memory, or ordinary memory, which may be swapped to disk.
    pub key_memory: String,
    /// Calls of providers.
    pub provider_calls: u64,
    /// Calls that failed.
    pub provider_failures: u64,
    /// Provisioned keys in stock, good or not; nothing if this mount uses none.
    pub provisioned_keys: Option<u64>,
    /// Operations that wait for a provider.
    pub operations_waiting: u64,
    /// All keys were dropped by `kmsfs lock` or for want of use.
    pub locked: bool,
    /// Files with an open handle.
    pub files_open: u64,
    /// Inodes that the kernel knows.
    pub inodes_known: u64,
    /// Files whose disk size does not yet tell their plain size.
    pub unsettled_files: u64,
    /// How often an entry was left out because its name does not decrypt.
    pub undecryptable_names: u64,
    /// Files found without an end mark.
    pub missing_end_marks: u64,
    /// Pages that did not authenticate.
    pub unauthentic_pages: u64,
    /// Names that were moved or linked, and those that are being moved now: see `kmsfs rewrap`.
    pub names_moved: u64,
    /// Moves under way.
    pub names_moving: u64,
}

impl Filesystem {
    /// The volume's state now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let config = &self.volume.config;
        let keys = self.volume.ring.stats();
        let wrapping_key = self.rekeying.wrapping_key();
        let recipients = self.volume.ring.recipients().into_iter().filter(|recipient| recipient.wraps_new);
        let recipients = recipients.map(|recipient| format!("{}:{}", recipient.kind, recipient.key));
        let further_recipients = recipients.filter(|key| *key != wrapping_key).collect();
        Stats {
            further_recipients,
            volume_id: config.volume_id.clone(),
            cipher_directory: self.backing.directory.path().to_string_lossy().into_owned(),
            suite: config.suite.clone(),
            read_only: self.options.read_only,
            backing_block_size: self.space().map_or(0, |space| space.block_size),
            wrapping_key,
            files_per_data_key: config.files_per_data_key,
            key_cache_hits: keys.hits,
            key_cache_misses: keys.misses,
            key_cache_entries: keys.entries,
            key_memory: keys.memory.name().to_owned(),
            provider_calls: keys.calls.total(),
            provider_failures: keys.failures,
            provisioned_keys: self.volume.ring.provisioned_left(),
            operations_waiting: self.pools.keys.unfinished() as u64,
            locked: self.volume.ring.is_locked(),
            files_open: self.inodes.open_files(),
            inodes_known: self.inodes.len() as u64,
            unsettled_files: self.work.unsettled.count_unsettled(),
            undecryptable_names: self.telemetry.undecryptable_names.load(Ordering::Relaxed),
            missing_end_marks: self.telemetry.events.missing_end_marks.load(Ordering::Relaxed),
            unauthentic_pages: self.telemetry.events.unauthentic_pages.load(Ordering::Relaxed),
            names_moving: self.telemetry.renames.under_way(),
            names_moved: self.telemetry.renames.begun(),
        }
    }
}

impl Filesystem {
    /// An operation begins that ends before its thread does anything else.
    pub fn begin(&self, operation: Operation, caller: Caller) -> Begun<&OperationCounts> {
        caller.works_here();
        Begun::new(operation, &self.telemetry.operations)
    }

    /// An operation begins that may end elsewhere.
    pub fn begin_to_end_anywhere(&self, operation: Operation, caller: Caller) -> Begun<Arc<OperationCounts>> {
        caller.works_here();
        Begun::new(operation, Arc::clone(&self.telemetry.operations))
    }

    /// From now on no operation begins, whoever still has the mount: threads that get one wait for the end of the process. Whether
    /// those under way end within `patience`.
    #[must_use]
    pub fn end_operations(&self, patience: Duration) -> bool {
        self.telemetry.operations.end(patience)
    }

    /// What was counted.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        Metrics {
            operations: self.telemetry.operations.read_all(),
            read_bytes: self.telemetry.operations.read.read(),
            written_bytes: self.telemetry.operations.written.read(),
            keys: self.volume.ring.measures(),
            descriptors: self.descriptors_in_use() as u64,
            descriptor_limit: self.descriptors.limit(),
        }
    }
}
