//! Which files an interrupted run of `kmsfs rekey` has dealt with.
//!
//! They are kept in the user's own directory, beside the remembered volumes: whoever may write the cipher directory must not be
//! able to say that a file has a new data key. Invariant: they are those of one run, and gone when it has ended.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::cli::environment::Environment;
use crate::cli::error::CliError;
use crate::crypto::random_array;
use crate::fs::Run;

/// The id of a file, as its header has it.
pub(super) type FileId = [u8; 32];

/// The notes of the run that is under way.
pub(super) struct Notes {
    /// None if there is no place for them.
    path: Option<PathBuf>,
    file: Option<File>,
    pub(super) run: Run,
    done: Mutex<HashSet<FileId>>,
}

impl Notes {
    /// Those of an interrupted run on this volume, or of a new one.
    pub(super) fn load(environment: &Environment, volume_id: &str) -> Result<Self, CliError> {
        let directory = environment.data_directory();
        let path = directory.as_ref().map(|directory| directory.join(format!("rekey-{volume_id}")));
        let mut bytes = Vec::new();
        if let Some(path) = &path {
            match File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(CliError::io(path.display(), &error));
                }
                _ => {}
            }
        }
        let (run, ids) = bytes.split_first_chunk().map_or_else(|| (random_array(), &[][..]), |(run, ids)| (*run, ids));
        let done = Mutex::new(ids.as_chunks().0.iter().copied().collect());
        Ok(Self { path, file: None, run, done })
    }

    /// From now on what is done is noted.
    pub(super) fn begin(&mut self) -> Result<(), CliError> {
        let Some(path) = &self.path else { return Ok(()) };
        let failed = |error: io::Error| CliError::io(path.display(), &error);
        if let Some(directory) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        }
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(path).map_err(failed)?;
        // What a crash has cut off would move everything behind it.
        let len = file.metadata().map_err(failed)?.len();
        file.set_len(if len < 16 { 0 } else { len - (len - 16) % 32 }).map_err(failed)?;
        if len < 16 {
            file.write_all(&self.run).map_err(failed)?;
        }
        self.file = Some(file);
        Ok(())
    }

    pub(super) fn has(&self, id: &FileId) -> bool {
        self.done().contains(id)
    }

    /// Notes a file; returns whether it was not noted before. Not durable: it saves work, nothing else.
    pub(super) fn note(&self, id: FileId) -> bool {
        let new = self.done().insert(id);
        if let Some(mut file) = self.file.as_ref().filter(|_| new) {
            // Without the note the file is sealed again when the command is, which does no harm.
            let _ = file.write_all(&id);
        }
        new
    }

    /// The run is over: the next one begins anew.
    pub(super) fn forget(&self) -> Result<(), CliError> {
        match self.path.as_ref().map(|path| (path, fs::remove_file(path))) {
            Some((path, Err(error))) if error.kind() != io::ErrorKind::NotFound => {
                Err(CliError::io(path.display(), &error))
            }
            _ => Ok(()),
        }
    }

    fn done(&self) -> MutexGuard<'_, HashSet<FileId>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
