//! What can be done only when all files have their names: hard links, and the attributes of directories.

use std::cmp::Reverse;

use super::copy::{Copy, PARTIAL, locked};
use super::side::{Result, Side, TransferError};

impl<S: Side, T: Side> Copy<'_, S, T> {
    pub(super) fn finish(&self) {
        for (path, inode) in std::mem::take(&mut *locked(&self.links)) {
            if let Err(error) = self.link(&path, inode) {
                self.fail(&path, error);
            }
        }
        // Those below come first: an owner may not be allowed into what has its final mode.
        let mut directories = locked(&self.directories).clone();
        directories.sort_by_key(|path| Reverse(parts(path).count()));
        for path in directories {
            if let Err(error) = self.finish_directory(&path) {
                self.fail(&path, error);
            }
        }
        if let Err(error) = self.target.sync(&self.base.target) {
            self.fail(b".", error);
        }
    }

    fn link(&self, path: &[u8], inode: (u64, u64)) -> Result<()> {
        let first_name = locked(&self.first_names).get(&inode).cloned().unwrap_or_default();
        let failed = || TransferError::LinkFailed(String::from_utf8_lossy(&first_name).into_owned());
        let first = self.target_at(&first_name)?.filter(|_| !self.has_failed(&first_name)).ok_or_else(failed)?;
        let (above, name) = split(path);
        let directory = self.target_at(above)?.ok_or_else(failed)?;
        if let Some(existing) = self.target.lookup(&directory, name)?
            && self.target.meta(&existing)?.inode == self.target.meta(&first)?.inode
        {
            self.progress.kept(0);
            return Ok(());
        }
        let partial = [PARTIAL, b"link"].concat();
        if self.target.lookup(&directory, &partial)?.is_some() {
            self.target.unlink(&directory, &partial)?;
        }
        self.target.link(&first, &directory, &partial)?;
        self.target.rename(&directory, &partial, name)?;
        self.progress.linked();
        Ok(())
    }

    fn finish_directory(&self, path: &[u8]) -> Result<()> {
        let pair = self.source_at(path)?.zip(self.target_at(path)?);
        // Somebody removed it meanwhile.
        let Some((source, target)) = pair else { return Ok(()) };
        let meta = self.source.meta(&source)?;
        self.give_attributes(&source, &target, &meta)
    }

    /// What is at `path` of the source, from where the copy begins.
    pub(super) fn source_at(&self, path: &[u8]) -> Result<Option<S::Object>> {
        find(self.source, self.base.source.clone(), parts(path))
    }

    /// What is at `path` of the target.
    pub(super) fn target_at(&self, path: &[u8]) -> Result<Option<T::Object>> {
        let mut parts = parts(path);
        let first = parts.next().map(|first| self.base.target_name(first));
        find(self.target, self.base.target.clone(), first.into_iter().chain(parts))
    }
}

fn find<'p, A: Side>(side: &A, start: A::Object, parts: impl Iterator<Item = &'p [u8]>) -> Result<Option<A::Object>> {
    let mut at = start;
    for part in parts {
        match side.lookup(&at, part)? {
            Some(next) => at = next,
            None => return Ok(None),
        }
    }
    Ok(Some(at))
}

fn parts(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty())
}

/// The directory and the last part.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}
