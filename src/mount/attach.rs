//! Attaching and detaching a mount point: `mount(2)` for root, `fusermount3` for everybody else.

use std::env;
use std::ffi::{CString, OsStr};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg, socketpair,
};

use super::Options;
use super::low_latency::{self, DEVICE as LATENCY_DEVICE};
use super::table;

const DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";
const SYSTEM: [&str; 2] = ["/usr/bin", "/bin"];
/// The line of `/etc/fuse.conf` that lets ordinary users let others in.
const OTHERS_ALLOWED: &str = "user_allow_other";
const SUBTYPE: &str = "kmsfs";
/// `S_IFMT` bits of a directory in octal, as the kernel wants them.
const ROOT_MODE: &str = "40000";

/// Why a mount point cannot be attached, served or detached.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is no FUSE device, or this user may not open it.
    #[error("{DEVICE} cannot be opened: {0}")]
    NoDevice(io::Error),
    /// The helper for ordinary users is missing.
    #[error("{HELPER}, with which ordinary users mount, cannot be run: {0}")]
    NoHelper(io::Error),
    /// What `lowlatency` needs cannot be had.
    #[error("-o lowlatency: {LATENCY_DEVICE} cannot be opened ({0}): mount as root, or without it")]
    NoLatencyDevice(io::Error),
    /// This user may not let others in.
    #[error("-o allow_other: the system lets only root do that")]
    NoOthers,
    /// Nothing can be mounted at this place.
    #[error("the mount point cannot be used: {0}")]
    Place(String),
    /// The helper or the kernel said no.
    #[error("the mount was refused: {0}")]
    Refused(String),
    /// The mount is in use.
    #[error("the mount is in use: close what is open on it")]
    Busy,
    /// There is no mount.
    #[error("nothing is mounted there")]
    NotMounted,
    /// The session with the kernel failed.
    #[error("the session with the kernel failed: {0}")]
    Session(#[from] io::Error),
}

/// Checks that this user may mount, before anything is made for it: with `allow_other`, and with `low_latency`.
///
/// # Errors
/// [`MountError`].
pub fn check_rights(allow_other: bool, low_latency: bool) -> Result<(), MountError> {
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    device.map_err(|error| MountError::NoDevice(error.into()))?;
    if low_latency {
        low_latency::open_device()?;
    }
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let helper = helper();
    if !helper.is_file() {
        return Err(MountError::NoHelper(io::ErrorKind::NotFound.into()));
    }
    // A helper that was installed elsewhere may have its settings elsewhere.
    let is_systems = SYSTEM.iter().any(|place| helper.starts_with(place));
    let settings = std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    let allowed = || settings.lines().any(|line| line.split('#').next().unwrap_or_default().trim() == OTHERS_ALLOWED);
    if allow_other && is_systems && !allowed() { Err(MountError::NoOthers) } else { Ok(()) }
}

/// Attaches the mount point at `directory`, which was checked, and returns the descriptor to serve it through. Its path is not
/// walked again: who may change it may have put another directory there.
pub(super) fn attach(options: &Options, directory: BorrowedFd<'_>) -> Result<OwnedFd, MountError> {
    // Standard output is something else to the helper.
    let directory = directory.try_clone_to_owned()?;
    let place = held(directory.as_fd());
    if std::fs::read_link(&place).ok().as_deref() != Some(&*options.mountpoint) {
        let reason = format!("{} is no longer the directory that was checked", options.mountpoint.display());
        return Err(MountError::Place(reason));
    }
    if !rustix::process::geteuid().is_root() {
        return attach_by_helper(options, &place);
    }
    match attach_directly(options, &place) {
        // Root of a container without the right to mount may still have the helper.
        Err(MountError::Refused(reason)) => attach_by_helper(options, &place).map_err(|_| MountError::Refused(reason)),
        result => result,
    }
}

/// What reaches a held directory without walking a path.
fn held(directory: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

fn attach_directly(options: &Options, place: &Path) -> Result<OwnedFd, MountError> {
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| MountError::NoDevice(error.into()))?;
    let data = kernel_options(options, device.as_raw_fd());
    let data = CString::new(data).map_err(|error| MountError::Refused(error.to_string()))?;
    let kind = format!("fuse.{SUBTYPE}");
    rustix::mount::mount(&options.source, place, kind, flags(options), data.as_c_str())
        .map_err(|error| MountError::Refused(error.to_string()))?;
    Ok(device)
}

/// What the helper calls the flags of [`Options::vfs`]; the last one is `MS_NOSYMFOLLOW`.
const VFS: [(MountFlags, &str); 6] = [
    (MountFlags::SYNCHRONOUS, "sync"),
    (MountFlags::DIRSYNC, "dirsync"),
    (MountFlags::NODIRATIME, "nodiratime"),
    (MountFlags::STRICTATIME, "strictatime"),
    (MountFlags::LAZYTIME, "lazytime"),
    (MountFlags::from_bits_retain(1 << 8), "nosymfollow"),
];

fn kernel_options(options: &Options, device: i32) -> String {
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let mut data = format!("fd={device},rootmode={ROOT_MODE},user_id={user},group_id={group},default_permissions");
    if options.allow_other {
        data.push_str(",allow_other");
    }
    data
}

fn flags(options: &Options) -> MountFlags {
    let mut flags = MountFlags::from_bits_retain(options.vfs);
    flags.set(MountFlags::RDONLY, options.read_only);
    flags.set(MountFlags::NOSUID, !options.suid);
    flags.set(MountFlags::NODEV, !options.dev);
    flags.set(MountFlags::NOEXEC, !options.exec);
    flags.set(MountFlags::NOATIME, options.noatime);
    flags
}

/// The helper, where systems have it; else the first on the user's path. Directories that cannot be looked into, such as those of
/// a dead mount, are passed over: the search of `execvp(3)` ends at them.
fn helper() -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places = SYSTEM.iter().map(PathBuf::from).chain(env::split_paths(&path)).map(|place| place.join(HELPER));
    places.find(|place| place.is_file()).unwrap_or_else(|| PathBuf::from(HELPER))
}

/// The helper mounts on the directory it is in with root's rights, and sends the descriptor back over the socket it has as
/// standard input.
fn attach_by_helper(options: &Options, place: &Path) -> Result<OwnedFd, MountError> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|error| MountError::Session(error.into()))?;
    let child = Command::new(helper())
        .args(["-o", &helper_options(options), "--", "."])
        .current_dir(place)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(MountError::NoHelper)?;
    let device = receive_descriptor(&ours);
    let output = child.wait_with_output().map_err(MountError::NoHelper)?;
    device.map_err(MountError::Session)?.ok_or_else(|| refusal(complaint(&output)))
}

/// What the helper means.
fn refusal(complaint: String) -> MountError {
    match complaint.to_lowercase() {
        text if text.contains(OTHERS_ALLOWED) => MountError::NoOthers,
        text if text.contains("mountpoint") || text.contains("mounting over") => MountError::Place(complaint),
        _ => MountError::Refused(complaint),
    }
}

fn helper_options(options: &Options) -> String {
    let mut words = vec![
        format!("fsname={}", escape(&options.source)),
        format!("subtype={SUBTYPE}"),
        "default_permissions".to_owned(),
    ];
    let switches = [
        (options.read_only, "ro"),
        (options.allow_other, "allow_other"),
        (options.suid, "suid"),
        (options.dev, "dev"),
        (!options.exec, "noexec"),
        (options.noatime, "noatime"),
    ];
    let vfs = VFS.iter().map(|(flag, word)| (options.vfs & flag.bits() != 0, *word));
    words.extend(switches.into_iter().chain(vfs).filter(|(on, _)| *on).map(|(_, word)| word.to_owned()));
    words.join(",")
}

/// A comma in a name would begin another option.
fn escape(name: &str) -> String {
    name.replace('\\', "\\\\").replace(',', "\\,")
}

fn receive_descriptor(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(descriptor)
}

fn complaint(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim();
    if text.is_empty() { format!("{HELPER} ended with {}", output.status) } else { text.to_owned() }
}

/// Changes the flags of a mount that is there. What is not a flag of the kernel's stays as it is.
///
/// # Errors
/// [`MountError::NotMounted`] or [`MountError::Refused`]: only root may.
pub fn remount(options: &Options) -> Result<(), MountError> {
    let flags_of_path = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(&options.mountpoint, flags_of_path, Mode::empty()).map_err(io::Error::from)?;
    let place = held(root.as_fd());
    if std::fs::read_link(&place)? != options.mountpoint
        || !table::mount_at(&options.mountpoint).is_ok_and(|found| found.is_some())
    {
        return Err(MountError::NotMounted);
    }
    rustix::mount::mount_remount(&place, flags(options), c"").map_err(|error| match error {
        Errno::INVAL => MountError::NotMounted,
        other => MountError::Refused(other.to_string()),
    })
}

/// Detaches a mount point. A lazy unmount always works, and ends when the last user is gone.
///
/// # Errors
/// [`MountError::Busy`], [`MountError::NotMounted`] or [`MountError::Refused`].
pub fn unmount(mountpoint: &Path, lazy: bool) -> Result<(), MountError> {
    if rustix::process::geteuid().is_root() {
        let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        return rustix::mount::unmount(mountpoint, flags | UnmountFlags::NOFOLLOW).map_err(|error| match error {
            Errno::BUSY => MountError::Busy,
            Errno::INVAL => MountError::NotMounted,
            other => MountError::Refused(other.to_string()),
        });
    }
    unmount_by_helper(mountpoint.as_os_str(), lazy)
}

fn unmount_by_helper(mountpoint: &OsStr, lazy: bool) -> Result<(), MountError> {
    let how = if lazy { "-uz" } else { "-u" };
    let output = Command::new(helper())
        .args([how, "--"])
        .arg(mountpoint)
        .env("LC_ALL", "C")
        .output()
        .map_err(MountError::NoHelper)?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = complaint(&output);
    Err(match complaint.to_lowercase() {
        text if text.contains("busy") => MountError::Busy,
        text if text.contains("not found") || text.contains("not mounted") => MountError::NotMounted,
        _ => MountError::Refused(complaint),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_the_source_begins_no_option() {
        let options = Options { source: "/data/a,suid\\b".to_owned(), ..Options::default() };
        assert!(helper_options(&options).starts_with("fsname=/data/a\\,suid\\\\b,subtype=kmsfs,"));
    }

    #[test]
    fn what_the_helper_says_of_the_place_and_of_others_is_told_from_the_rest() {
        let of = |said: &str| refusal(format!("fusermount3: {said}"));
        assert!(matches!(of("user has no write access to mountpoint /m"), MountError::Place(_)));
        assert!(matches!(of("mounting over filesystem type 0x9fa0 is forbidden"), MountError::Place(_)));
        let others = "option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf";
        assert!(matches!(of(others), MountError::NoOthers));
        assert!(matches!(of("mount failed: Operation not permitted"), MountError::Refused(_)));
    }

    #[test]
    fn defaults_are_the_safe_ones() {
        assert_eq!(flags(&Options::default()), MountFlags::NOSUID | MountFlags::NODEV);
        assert!(!kernel_options(&Options::default(), 3).contains("allow_other"));
    }

    #[test]
    fn another_directory_at_the_path_is_not_mounted_on() {
        let dir = tempfile::tempdir().unwrap();
        let home = std::fs::canonicalize(dir.path()).unwrap();
        let (path, moved, other) = (home.join("place"), home.join("moved"), home.join("other"));
        [&path, &other].iter().for_each(|directory| std::fs::create_dir(directory).unwrap());
        let held = OwnedFd::from(std::fs::File::open(&path).unwrap());
        std::fs::rename(&path, &moved).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        let options = Options { mountpoint: path.clone(), ..Options::default() };
        assert!(matches!(attach(&options, held.as_fd()), Err(MountError::Place(why)) if why.contains("checked")));
        assert!([&path, &moved, &other].iter().all(|place| table::mounts_at(place).is_empty()));
    }

    #[test]
    fn unmounting_nothing_says_so() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(unmount(dir.path(), false), Err(MountError::NotMounted | MountError::Refused(_))));
    }
}
