//! The part of `kmsfs doctor` that looks at the host: the backing filesystem, the lock, FUSE, limits.

use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use rustix::fs::{Access, AtFlags, StatVfs, StatVfsMountFlags};
use rustix::process::{DumpableBehavior, Resource};

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit, device_hint};
use crate::crypto::{KeyMemory, Secret};
use crate::daemon::control::{self, ControlError};
use crate::format::geometry::PAGE_LEN;
use crate::storage::CipherDirectory;
use crate::storage::cipher_directory::{LockError, LockMode};

use super::doctor::Findings;
use super::doctor_wakes;

/// What all keys in memory take: 16384 of them, and what is made ahead.
const LOCKED_MEMORY: u64 = 1 << 20;
/// Every file that the kernel knows holds a descriptor; with fewer a walk over a large tree comes to an end.
const OPEN_FILES: u64 = 16_384;
/// Less free space than this is worth a word.
const LITTLE_SPACE: u64 = 64 << 20;
/// And so is less than this share of all inodes.
const FEW_INODES: u64 = 100;

/// Checks what has nothing to do with a volume.
pub(super) fn check(environment: &Environment, findings: &mut Findings) {
    if cfg!(feature = "mount") {
        check_device(findings);
        check_helper(environment, findings);
        check_sockets(environment, findings);
        doctor_wakes::check(findings);
    } else {
        findings.warn("fuse", "this kmsfs was built without FUSE", "build it with the feature `mount`");
    }
    check_limits(findings);
    check_dumps(findings);
}

fn check_device(findings: &mut Findings) {
    const CHECK: &str = "/dev/fuse";
    let Err(error) = File::options().read(true).write(true).open("/dev/fuse") else {
        return findings.ok(CHECK, "can be opened");
    };
    findings.fail(CHECK, Exit::NoFuse as u8, &error, Some(device_hint(&error)));
}

fn check_helper(environment: &Environment, findings: &mut Findings) {
    const CHECK: &str = "fusermount3";
    if rustix::process::geteuid().is_root() {
        return findings.ok(CHECK, "not needed: this is root");
    }
    let path = environment.get("PATH").unwrap_or_default();
    let found: Option<(PathBuf, u32)> = std::env::split_paths(&path).find_map(|directory| {
        let helper = directory.join("fusermount3");
        let mode = helper.metadata().ok().filter(std::fs::Metadata::is_file)?.permissions().mode();
        (mode & 0o111 != 0).then_some((helper, mode))
    });
    match found {
        None => findings.fail(
            CHECK,
            Exit::NoFuse as u8,
            "not in PATH, and only root can mount without it",
            Some("install the package fuse3"),
        ),
        Some((helper, mode)) if mode & 0o4000 == 0 => findings.warn(
            CHECK,
            format!("{} is not setuid root: it may not be able to mount", helper.display()),
            "install the package fuse3 anew, or `chmod u+s` it",
        ),
        Some((helper, _)) => findings.ok(CHECK, helper.display()),
    }
}

/// Where the process of a mount could be asked.
fn check_sockets(environment: &Environment, findings: &mut Findings) {
    const CHECK: &str = "control socket";
    let join = |refused: &[ControlError]| refused.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    match control::find(environment.runtime_directory().as_deref()) {
        Ok((place, refused)) if refused.is_empty() => findings.ok(CHECK, place.display()),
        Ok((place, refused)) => findings.ok(CHECK, format!("{} (not {})", place.display(), join(&refused))),
        Err(mut refused) => {
            let what = join(&refused);
            let error = CliError::from(refused.pop().unwrap_or(ControlError::NoDirectory));
            findings.fail(CHECK, error.code(), what, error.hint_text());
        }
    }
}

fn check_limits(findings: &mut Findings) {
    check_key_memory(findings);
    let files = rustix::process::getrlimit(Resource::Nofile).maximum;
    match files {
        Some(files) if files < OPEN_FILES => findings.warn(
            "open files",
            format!("at most {files}: a walk over a large tree may fail"),
            "raise the hard limit: LimitNOFILE=1048576 in a unit, `nofile` in /etc/security/limits.conf",
        ),
        _ => findings.ok("open files", files.map_or("no limit".to_owned(), |files| format!("at most {files}"))),
    }
}

/// What the limit lets a mount lock, and what this process got when it made a key.
fn check_key_memory(findings: &mut Findings) {
    const CHECK: &str = "locked memory";
    const MEND: &str = "raise it: LimitMEMLOCK=8M in a unit, `memlock` in /etc/security/limits.conf";
    let limit = rustix::process::getrlimit(Resource::Memlock).current;
    let limit_text = limit.map_or("no limit".to_owned(), |bytes| format!("{} KiB", bytes / 1024));
    drop(Secret::<32>::random());
    let memory = KeyMemory::in_use();
    if memory == KeyMemory::Ordinary {
        return findings.warn(CHECK, format!("{limit_text}: keys are in ordinary memory, which may be swapped"), MEND);
    }
    match limit {
        Some(bytes) if bytes < LOCKED_MEMORY && !rustix::process::geteuid().is_root() => {
            findings.warn(CHECK, format!("{limit_text}: not all keys can be kept out of swap"), MEND);
        }
        _ => findings.ok(CHECK, format!("{limit_text}; keys are in {} memory", memory.name())),
    }
}

/// Every command turns dumps off for itself; this is what that came to.
fn check_dumps(findings: &mut Findings) {
    const CHECK: &str = "core dumps";
    let limit = rustix::process::getrlimit(Resource::Core).current;
    let hidden = rustix::process::dumpable_behavior().is_ok_and(|b| b == DumpableBehavior::NotDumpable);
    if limit == Some(0) && hidden {
        return findings.ok(CHECK, "off, and no other process of this user can read the memory");
    }
    findings.fail(CHECK, Exit::Other as u8, "on: a crash would write keys to disk", Some("run where prctl(2) works"));
}

/// Whether this user may do in the cipher directory what a mount does.
pub(super) fn check_access(directory: &CipherDirectory, read_only: bool, findings: &mut Findings) {
    const CHECK: &str = "cipher directory";
    let needed = Access::READ_OK | Access::EXEC_OK;
    let needed = if read_only { needed } else { needed | Access::WRITE_OK };
    match rustix::fs::accessat(directory.root_fd(), ".", needed, AtFlags::EACCESS) {
        Ok(()) => findings.ok(CHECK, directory.path().display()),
        Err(error) => {
            let what = format!("{}: {}", directory.path().display(), io::Error::from(error));
            let mend = "give this user the directory, or mount with --read-only (`kmsfs doctor --read-only`)";
            findings.fail(CHECK, Exit::Io as u8, what, Some(mend));
        }
    }
}

/// Looks at the filesystem that holds the ciphertext.
pub(super) fn check_backing(directory: &CipherDirectory, read_only: bool, findings: &mut Findings) {
    match rustix::fs::fstatvfs(directory.root_fd()) {
        Ok(found) => judge_backing(&found, read_only, findings),
        Err(error) => findings.fail("backing", Exit::Io as u8, io::Error::from(error), None),
    }
}

fn judge_backing(found: &StatVfs, read_only: bool, findings: &mut Findings) {
    if found.f_bsize >= PAGE_LEN as u64 {
        findings.ok("block size", found.f_bsize);
    } else {
        let what = format!("{}: a power cut can tear a page of {PAGE_LEN}, which then does not open", found.f_bsize);
        findings.warn("block size", what, "use a filesystem with blocks of 4096 bytes or more");
    }
    if read_only {
        return;
    }
    if found.f_flag.contains(StatVfsMountFlags::RDONLY) {
        let mend = "remount it, or mount the volume with --read-only (`kmsfs doctor --read-only`)";
        return findings.fail("free space", Exit::Io as u8, "the filesystem is read-only", Some(mend));
    }
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    match free {
        0 => findings.fail("free space", Exit::Io as u8, "none", Some("make room: nothing can be written")),
        free if free < LITTLE_SPACE => findings.warn("free space", format!("{} MiB", free >> 20), "make room"),
        free => findings.ok("free space", format!("{} MiB", free >> 20)),
    }
    // Filesystems that make inodes as they need them count none.
    match (found.f_files, found.f_favail) {
        (0, _) => findings.ok("free inodes", "as many as there is space"),
        (_, 0) => findings.fail("free inodes", Exit::Io as u8, "none", Some("remove files: none can be made")),
        (all, free) if free < all / FEW_INODES => findings.warn("free inodes", free, "remove files"),
        (_, free) => findings.ok("free inodes", free),
    }
}

/// Whether another process has the volume. The lock is taken for a moment, as a reader's: the kernel has no other way
/// to ask that works on every filesystem.
pub(super) fn check_lock(directory: &CipherDirectory, findings: &mut Findings) {
    const CHECK: &str = "lock";
    match directory.lock(LockMode::Shared).map(drop) {
        Ok(()) => findings.ok(CHECK, "not mounted for writing by anybody"),
        Err(error @ (LockError::Held { .. } | LockError::Elsewhere { .. })) => {
            let told = CliError::from(error);
            let mend = told.hint_text().unwrap_or("unmount it there first");
            findings.warn(CHECK, format!("{told}; it cannot be mounted a second time"), mend);
        }
        Err(error) => findings.fail(CHECK, CliError::from(error).code(), "the filesystem does not lock", None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(change: impl FnOnce(&mut StatVfs), read_only: bool) -> String {
        let home = tempfile::tempdir().unwrap();
        let mut found = rustix::fs::statvfs(home.path()).unwrap();
        (found.f_bsize, found.f_frsize, found.f_bavail) = (4096, 4096, 1 << 20);
        (found.f_files, found.f_favail, found.f_flag) = (1 << 20, 1 << 19, StatVfsMountFlags::empty());
        change(&mut found);
        let mut findings = Findings::default();
        judge_backing(&found, read_only, &mut findings);
        format!("{findings:?}")
    }

    #[test]
    fn the_backing_filesystem_is_judged() {
        let healthy = judge(|_| {}, false);
        assert!(!healthy.contains("Warn") && !healthy.contains("Fail"), "{healthy}");
        assert!(judge(|found| found.f_bsize = 1024, false).contains("Warn"));
        assert!(judge(|found| found.f_bavail = 1, false).contains("Warn"));
        assert!(judge(|found| found.f_favail = 1, false).contains("Warn"));
        assert!(!judge(|found| (found.f_files, found.f_favail) = (0, 0), false).contains("Fail"));
        let broken: [fn(&mut StatVfs); 3] =
            [|found| found.f_bavail = 0, |found| found.f_favail = 0, |found| found.f_flag = StatVfsMountFlags::RDONLY];
        for change in broken {
            assert!(judge(change, false).contains("Fail") && !judge(change, true).contains("Fail"));
        }
    }
}
