//! Where the provisioned keys of a volume lie, for the ring that uses them.

use std::io;

use crate::keys::ProvisionedKeys;
use crate::lease::Permit;
use crate::storage::{Candidate, KeyStock};

/// The stock of a volume, which changes only while the volume is this host's to write.
pub(crate) struct Stock {
    pub(crate) stock: KeyStock,
    pub(crate) permit: Permit,
}

impl ProvisionedKeys for Stock {
    fn next(&self) -> io::Result<Option<(String, Vec<u8>, usize)>> {
        Ok(self.stock.next()?.map(|Candidate { name, bytes, more }| (name, bytes, more)))
    }

    fn claim(&self, name: &str) -> io::Result<bool> {
        self.permit.check()?;
        self.stock.claim(name)
    }

    fn put_back(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.permit.check()?;
        self.stock.add(name, bytes)?;
        self.stock.sync()
    }

    fn reject(&self, name: &str) -> bool {
        self.stock.reject(name)
    }

    fn count(&self) -> io::Result<u64> {
        self.stock.names().map(|names| names.len() as u64)
    }
}
