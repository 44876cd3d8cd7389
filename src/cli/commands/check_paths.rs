//! Which volume, and which part of it, a path names: a cipher directory, a mount, or something in one of them.

use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use crate::check::Target;
use crate::cli::error::{CliError, Exit};
use crate::cli::mount_point;
use crate::format::name::VOLUME_DIR;

/// A mount of ours.
pub(super) struct Mounted {
    at: PathBuf,
    cipher_directory: PathBuf,
}

impl Mounted {
    /// The cipher directory, and `path` from the mount point on, if it lies there.
    pub(super) fn below<'p>(&self, path: &'p Path) -> Option<(&Path, &'p Path)> {
        Some((&self.cipher_directory, path.strip_prefix(&self.at).ok()?))
    }
}

/// The volumes that the paths name, in their order, each with what is to be checked of it, and why others name none.
pub(super) fn volumes(paths: &[PathBuf]) -> (Vec<(PathBuf, Vec<Target>)>, Vec<CliError>) {
    let mounts = all_mounts();
    let mut volumes: Vec<(PathBuf, Vec<Target>)> = Vec::new();
    let mut failures = Vec::new();
    for path in paths {
        match locate(path, &mounts) {
            Err(error) => failures.push(error),
            Ok((cipher_directory, target)) => match volumes.iter_mut().find(|(known, _)| *known == cipher_directory) {
                Some((_, targets)) => targets.push(target),
                None => volumes.push((cipher_directory, vec![target])),
            },
        }
    }
    (volumes, failures)
}

/// The mounts that this process sees.
pub(super) fn all_mounts() -> Vec<Mounted> {
    mounts(&fs::read("/proc/self/mountinfo").unwrap_or_default())
}

/// The cipher directory of the volume that `path` names or lies in, and which part of the volume it is.
pub(super) fn locate(path: &Path, mounts: &[Mounted]) -> Result<(PathBuf, Target), CliError> {
    let failed = |error| CliError::of(Exit::CipherDirectory, path.display(), &error);
    // A mount point may be named by a symlink, and may not answer.
    let whole = mount_point::canonical(path).map_err(failed)?;
    if let Some(mount) = mounts.iter().find(|mount| mount.at == whole) {
        return Ok((mount.cipher_directory.clone(), Target::Plain(Vec::new())));
    }
    if is_volume(&whole).map_err(failed)? {
        return Ok((whole, Target::Cipher(Vec::new())));
    }
    let path = itself(path).map_err(failed)?;
    if let Some((root, below)) = mounts.iter().find_map(|mount| mount.below(&path)) {
        let names = below.components().map(|name| name.as_os_str().as_bytes().to_vec());
        return Ok((root.to_owned(), Target::Plain(names.collect())));
    }
    let root = path.ancestors().skip(1).find(|above| is_volume(above).unwrap_or(false));
    let root = root.ok_or_else(|| {
        let what = format!("{} is neither a volume nor in one", path.display());
        CliError::new(Exit::CipherDirectory, what).hint("name a cipher directory, a mount point, or something in one")
    })?;
    let below = path.strip_prefix(root).unwrap_or(Path::new(""));
    let entries: Vec<String> = below.iter().map(|entry| entry.to_string_lossy().into_owned()).collect();
    if entries.first().is_some_and(|entry| entry == VOLUME_DIR) {
        return Err(CliError::usage(format_args!(
            "{}: name the cipher directory to check {VOLUME_DIR}",
            path.display()
        )));
    }
    Ok((root.to_owned(), Target::Cipher(entries)))
}

/// Whether a volume lies in `directory`. That it cannot be known is an error, not an answer.
fn is_volume(directory: &Path) -> std::io::Result<bool> {
    match fs::metadata(directory.join(VOLUME_DIR)) {
        Ok(found) => Ok(found.is_dir()),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Err(error),
        Err(_) => Ok(false),
    }
}

/// The canonical path of what `path` names itself, be it a symlink.
fn itself(path: &Path) -> std::io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    match (path.parent(), path.components().next_back()) {
        (Some(parent), Some(Component::Normal(name))) => Ok(fs::canonicalize(parent)?.join(name)),
        _ => fs::canonicalize(path),
    }
}

/// Mounts of ours, the newest first.
fn mounts(table: &[u8]) -> Vec<Mounted> {
    table.split(|byte| *byte == b'\n').rev().filter_map(mount).collect()
}

/// A line such as `36 35 0:33 / /mnt rw,nosuid - fuse.kmsfs /cipher rw`.
fn mount(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let at = path(fields.nth(4)?);
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let ours = fields.next()? == b"fuse.kmsfs";
    let cipher_directory = path(fields.next()?);
    (ours && cipher_directory.is_absolute()).then_some(Mounted { at, cipher_directory })
}

/// Space, tab, newline and backslash come as `\` and three octal digits.
fn path(field: &[u8]) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::with_capacity(field.len()), field);
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"35 1 0:30 / / rw - ext4 /dev/vda rw\n\
        36 35 0:33 / /mnt/a\\040b rw,nosuid shared:1 - fuse.kmsfs /data/c\\134d rw,user_id=0\n\
        37 35 0:34 / /mnt/other rw - fuse.sshfs /data/x rw\n";

    #[test]
    fn a_mount_leads_to_its_cipher_directory() {
        let mounts = mounts(TABLE);
        assert_eq!(mounts.len(), 1);
        assert_eq!(mounts[0].at, Path::new("/mnt/a b"));
        assert_eq!(mounts[0].cipher_directory, Path::new(r"/data/c\d"));
    }

    #[test]
    fn paths_name_volumes_and_parts_of_them() {
        let home = tempfile::tempdir().unwrap();
        let home = fs::canonicalize(home.path()).unwrap();
        fs::create_dir_all(home.join("cipher/.kmsfs")).unwrap();
        fs::create_dir_all(home.join("cipher/a/b")).unwrap();
        fs::create_dir_all(home.join("plain/d")).unwrap();
        std::os::unix::fs::symlink("nowhere", home.join("plain/link")).unwrap();
        let mounts = [Mounted { at: home.join("plain"), cipher_directory: home.join("elsewhere") }];
        let located = |path: &str| locate(&home.join(path), &mounts).map_err(|error| error.code());
        let entries = |names: &[&str]| Target::Cipher(names.iter().map(|name| (*name).to_owned()).collect());
        assert_eq!(located("cipher"), Ok((home.join("cipher"), entries(&[]))));
        assert_eq!(located("cipher/a/b"), Ok((home.join("cipher"), entries(&["a", "b"]))));
        assert_eq!(located("cipher/.kmsfs"), Err(Exit::Usage as u8));
        let names = |names: &[&str]| Target::Plain(names.iter().map(|name| name.as_bytes().to_vec()).collect());
        assert_eq!(located("plain"), Ok((home.join("elsewhere"), names(&[]))));
        assert_eq!(located("plain/d"), Ok((home.join("elsewhere"), names(&["d"]))));
        assert_eq!(located("missing/x"), Err(Exit::CipherDirectory as u8));
        assert_eq!(located("."), Err(Exit::CipherDirectory as u8));
    }
}
