//! The attendant: a small process of this program that attaches and detaches one mount point for the process that serves it. That
//! one holds keys, and gives up the right to mount anything before it has them; the attendant holds none, and does three
//! things on one path that was given to it when it was started. It also opens a device that only root may open.
//!
//! Its standard input is the conversation, and its standard output the directory to mount on. Each request is one packet, and so is its answer; with that of [`Request::Attach`] comes the descriptor to serve the mount
//! through, with that of [`Request::LatencyDevice`] the device.
//!
//! Invariants: it ends when the process that it attends does; signals that end that one leave it, so that it can still
//! unmount; it detaches nothing but a mount of ours; every wait for it has a deadline.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::attach::{self, MountError};
use super::{Options, low_latency, table, tuning};

/// The first argument of a process that is an attendant; its mount point and its options follow.
const ARGUMENT: &str = "--attend";
/// This program, whatever has become of its file.
const PROGRAM: &str = "/proc/self/exe";
/// The longest packet.
const MAX_PACKET: usize = 65536;
/// How long an answer may take: an unmount that is not lazy writes out what programs have written.
const ANSWER: Duration = Duration::from_secs(600);
/// How long it is waited for when nothing more is wanted of it.
const ITS_END: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Request {
    /// The kernel's device of [`super::low_latency`]: before [`Request::Attach`].
    LatencyDevice,
    Attach,
    /// The last request before the mount is told of. A process that ends before it leaves no mount.
    LiftLimits,
    Detach,
    DetachLazily,
}

/// A [`MountError`] between two processes.
#[derive(Debug, Serialize, Deserialize)]
enum Failure {
    NoDevice(String),
    NoHelper(String),
    NoLatencyDevice(String),
    NoOthers,
    Place(String),
    Refused(String),
    Busy,
    NotMounted,
    Session(String),
}

/// With that of [`Request::Attach`] comes the device of the mount.
type Answer = Result<Option<String>, Failure>;

/// The process that attends to a mount point. It ends when this is dropped.
pub struct Attendant {
    /// Held for one request and its answer.
    socket: Mutex<OwnedFd>,
    process: Child,
}

impl Attendant {
    /// Starts it for the mount that `options` describe, on `directory`, which was found at the mount point when it was checked.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(options: &Options, directory: OwnedFd) -> io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&ours, Timeout::Recv, Some(ANSWER))?;
        set_socket_timeout(&ours, Timeout::Send, Some(ANSWER))?;
        let path = env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
        let process = Command::new(PROGRAM)
            .arg(ARGUMENT)
            .arg(&options.mountpoint)
            .arg(serde_json::to_string(options)?)
            .env_clear()
            .env("PATH", path)
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(directory))
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { socket: Mutex::new(ours), process })
    }

    /// Attaches the mount point; returns the descriptor to serve it through, and its device.
    ///
    /// # Errors
    /// [`MountError`].
    pub(super) fn attach(&self) -> Result<(OwnedFd, String), MountError> {
        let (device, descriptor) = self.ask(Request::Attach)?;
        let descriptor =
            descriptor.ok_or_else(|| MountError::Refused("no descriptor came with the mount".to_owned()))?;
        Ok((descriptor, device.unwrap_or_default()))
    }

    /// What [`super::low_latency`] speaks to the kernel through.
    ///
    /// # Errors
    /// [`MountError::NoLatencyDevice`]: only root may.
    pub(super) fn latency_device(&self) -> Result<OwnedFd, MountError> {
        let (_, device) = self.ask(Request::LatencyDevice)?;
        device.ok_or_else(|| MountError::Refused("no descriptor came with the answer".to_owned()))
    }

    /// Lifts the kernel's limits on the mount where that is permitted.
    pub(super) fn lift_limits(&self) {
        if let Err(error) = self.ask(Request::LiftLimits) {
            tracing::debug!("the limits of the mount stay as they are: {error}");
        }
    }

    /// Detaches the mount point, as [`super::unmount`] does.
    ///
    /// # Errors
    /// [`MountError::Busy`], [`MountError::NotMounted`] or [`MountError::Refused`].
    pub fn detach(&self, lazy: bool) -> Result<(), MountError> {
        self.ask(if lazy { Request::DetachLazily } else { Request::Detach }).map(drop)
    }

    fn ask(&self, request: Request) -> Result<(Option<String>, Option<OwnedFd>), MountError> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        send(socket.as_fd(), &request, None)?;
        let (answer, descriptor) = receive::<Answer>(socket.as_fd())?.ok_or_else(gone)?;
        answer.map_err(MountError::from).map(|device| (device, descriptor))
    }
}

/// Why there is no answer from a process that has ended.
fn gone() -> MountError {
    MountError::Session(io::Error::other("the process that mounts has ended"))
}

impl Drop for Attendant {
    fn drop(&mut self) {
        let socket = self.socket.get_mut().unwrap_or_else(PoisonError::into_inner);
        // It sees the end of the conversation, and ends.
        let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both);
        let until = Instant::now() + ITS_END;
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Attends to the mount that `arguments`, which follow [`ARGUMENT`], describe, until the process that asks for things is gone.
///
/// # Errors
/// The arguments are not those of an attendant, or the conversation breaks.
pub fn attend(arguments: &[OsString]) -> io::Result<()> {
    let options = options_of(arguments).ok_or(io::ErrorKind::InvalidInput)?;
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    let socket = rustix::stdio::stdin();
    let (mut last, mut device) = (None, None);
    while let Some((request, _)) = receive(socket)? {
        last = Some(request);
        let (answer, descriptor) = match perform(request, &options, &mut device) {
            Ok(descriptor) => (Ok(device.clone()), descriptor),
            Err(error) => (Err(Failure::from(error)), None),
        };
        send(socket, &answer, descriptor)?;
    }
    // The process that was to serve has ended before anybody was told of the mount.
    if matches!(last, Some(Request::Attach)) {
        let _ = detach(device.as_deref(), true);
    }
    Ok(())
}

fn options_of(arguments: &[OsString]) -> Option<Options> {
    let [mountpoint, options] = arguments else { return None };
    let options: Options = serde_json::from_str(options.to_str()?).ok()?;
    Some(Options { mountpoint: mountpoint.into(), ..options })
}

/// Detaches the mount with this device, wherever it is now: a directory above it may have another name, or it has been bound to
/// a second place. What lies at its first place otherwise is not ours to detach.
fn detach(device: Option<&str>, lazy: bool) -> Result<(), MountError> {
    let places = device.map(table::places_of_device).unwrap_or_default();
    if places.is_empty() {
        return Err(MountError::NotMounted);
    }
    places.iter().try_for_each(|place| attach::unmount(place, lazy))
}

fn perform(request: Request, options: &Options, device: &mut Option<String>) -> Result<Option<OwnedFd>, MountError> {
    let mountpoint: &Path = &options.mountpoint;
    match request {
        Request::LatencyDevice => low_latency::open_device().map(Some),
        Request::Attach => {
            let descriptor = attach::attach(options, rustix::stdio::stdout())?;
            // The directory below the mount is held no longer: an automount point that is held never expires.
            rustix::stdio::dup2_stdout(rustix::stdio::stderr()).map_err(|error| MountError::Session(error.into()))?;
            *device = table::mounts_at(mountpoint).pop().map(|mount| mount.device);
            Ok(Some(descriptor))
        }
        Request::LiftLimits => {
            tuning::lift_limits(mountpoint);
            // Not before: while systemd mounts on an automount point, the kernel lets no group but that of its helpers pass.
            // Of a terminal that somebody uses, nothing must reach this process later. The leader of a group has one already.
            let _ = rustix::process::setsid();
            Ok(None)
        }
        Request::Detach => detach(device.as_deref(), false).map(|()| None),
        Request::DetachLazily => detach(device.as_deref(), true).map(|()| None),
    }
}

fn send(socket: BorrowedFd<'_>, packet: &impl Serialize, descriptor: Option<OwnedFd>) -> io::Result<()> {
    let bytes = serde_json::to_vec(packet)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.iter().map(AsFd::as_fd).collect();
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next packet, and what came with it; nothing when the other side has ended. A signal does not end the wait.
fn receive<T: for<'a> Deserialize<'a>>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match bytes.get(..received.bytes) {
        None | Some([]) => Ok(None),
        Some(packet) => Ok(Some((serde_json::from_slice(packet)?, descriptor))),
    }
}

/// Whether the process's first argument says that it is an attendant.
#[must_use]
pub fn is_attendant(argument: &OsStr) -> bool {
    argument == ARGUMENT
}

impl From<MountError> for Failure {
    fn from(error: MountError) -> Self {
        match error {
            MountError::NoDevice(why) => Self::NoDevice(why.to_string()),
            MountError::NoHelper(why) => Self::NoHelper(why.to_string()),
            MountError::NoLatencyDevice(why) => Self::NoLatencyDevice(why.to_string()),
            MountError::NoOthers => Self::NoOthers,
            MountError::Place(why) => Self::Place(why),
            MountError::Refused(why) => Self::Refused(why),
            MountError::Busy => Self::Busy,
            MountError::NotMounted => Self::NotMounted,
            MountError::Session(why) => Self::Session(why.to_string()),
        }
    }
}

impl From<Failure> for MountError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NoDevice(why) => Self::NoDevice(io::Error::other(why)),
            Failure::NoHelper(why) => Self::NoHelper(io::Error::other(why)),
            Failure::NoLatencyDevice(why) => Self::NoLatencyDevice(io::Error::other(why)),
            Failure::NoOthers => Self::NoOthers,
            Failure::Place(why) => Self::Place(why),
            Failure::Refused(why) => Self::Refused(why),
            Failure::Busy => Self::Busy,
            Failure::NotMounted => Self::NotMounted,
            Failure::Session(why) => Self::Session(io::Error::other(why)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn an_attendant_takes_its_own_arguments_only() {
        let odd = OsStr::from_bytes(b"/odd \xff");
        let options = Options { mountpoint: odd.into(), noatime: true, ..Options::default() };
        let arguments = [odd.to_owned(), serde_json::to_string(&options).unwrap().into()];
        let taken = options_of(&arguments).unwrap();
        assert_eq!((taken.mountpoint, taken.noatime, taken.suid), (odd.into(), true, false));
        assert!(options_of(&arguments[..1]).is_none());
        assert!(options_of(&["/mnt".into(), "{".into()]).is_none());
        assert!(is_attendant(OsStr::new(ARGUMENT)) && !is_attendant(OsStr::new("mount")));
    }

    #[test]
    fn packets_and_descriptors_arrive_and_an_end_is_seen() {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        send(theirs.as_fd(), &Answer::Ok(None), Some(null)).unwrap();
        send(theirs.as_fd(), &Answer::Err(Failure::from(MountError::Busy)), None).unwrap();
        let (answer, descriptor) = receive::<Answer>(ours.as_fd()).unwrap().unwrap();
        assert!(answer.is_ok() && descriptor.is_some());
        let (answer, descriptor) = receive::<Answer>(ours.as_fd()).unwrap().unwrap();
        assert!(matches!(answer.map_err(MountError::from), Err(MountError::Busy)) && descriptor.is_none());
        drop(theirs);
        assert!(receive::<Answer>(ours.as_fd()).unwrap().is_none());
    }
}
