//! Where the provisioned keys of a volume lie, for the ring that uses them.

use std::io;

use crate::keys::ProvisionedKeys;
use crate::storage::{Candidate, KeyStock};

impl ProvisionedKeys for KeyStock {
    fn next(&self) -> io::Result<Option<(String, Vec<u8>, usize)>> {
        Ok(Self::next(self)?.map(|Candidate { name, bytes, more }| (name, bytes, more)))
    }

    fn claim(&self, name: &str) -> io::Result<bool> {
        Self::claim(self, name)
    }

    fn put_back(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.add(name, bytes)?;
        self.sync()
    }

    fn reject(&self, name: &str) -> bool {
        Self::reject(self, name)
    }

    fn count(&self) -> io::Result<u64> {
        self.names().map(|names| names.len() as u64)
    }
}
