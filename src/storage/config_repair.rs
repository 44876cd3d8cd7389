//! Putting the copy of the config in the place of one that is missing or broken.
//!
//! Invariant: nothing is overwritten; what was the config is kept beside it.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::RenameFlags;
use rustix::io::Errno;

use crate::format::config::BROKEN_CONFIG_FILE;

use super::CipherDirectory;
use super::cipher_directory::{CONFIG, CONFIG_COPY, read_regular, write_durably};

/// Configs that are kept aside at most.
const KEPT: u32 = 100;

impl CipherDirectory {
    /// The copy of the config file: all of it, or enough of it to show that it is too large.
    ///
    /// # Errors
    /// Those of `open(2)` and `read(2)`.
    pub fn read_config_copy(&self) -> io::Result<Vec<u8>> {
        read_regular(self.volume.as_fd(), CONFIG_COPY)
    }

    /// Makes `config_file` the config. What has its name, if anything, is kept as `volume.toml.broken` and a number.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn restore_config(&self, config_file: &[u8]) -> io::Result<()> {
        for number in 0..KEPT {
            let aside = format!("{BROKEN_CONFIG_FILE}.{number}");
            match rustix::fs::renameat_with(&self.volume, CONFIG, &self.volume, &aside, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {}
                Ok(()) | Err(Errno::NOENT) => return write_durably(self.volume.as_fd(), CONFIG, config_file),
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_config_is_put_back_and_nothing_is_lost() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("c");
        let file = |name: &str| path.join(".kmsfs").join(name);
        let directory = CipherDirectory::create(&path, "first", "id").unwrap();
        directory.replace_config("second").unwrap();
        assert_eq!(directory.read_config_copy().unwrap(), b"second");
        fs::write(file(CONFIG), "broken").unwrap();
        directory.restore_config(b"second").unwrap();
        fs::remove_file(file(CONFIG)).unwrap();
        CipherDirectory::open(&path).unwrap_err();
        CipherDirectory::open_without_config(&path).unwrap().restore_config(b"again").unwrap();
        directory.restore_config(b"last").unwrap();
        let read = |name: &str| fs::read_to_string(file(name)).unwrap();
        assert_eq!([CONFIG, "volume.toml.broken.0", "volume.toml.broken.1"].map(read), ["last", "broken", "again"]);
    }
}
