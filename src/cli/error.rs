//! What a command says when it fails, and the exit code that goes with it.

use std::fmt;
use std::io::{self, Write as _};

use rustix::io::Errno;

use crate::cli::{in_use, report};
use crate::content::ContentError;
use crate::daemon::control::ControlError;
use crate::format::config::ConfigError;
use crate::keys::{KeyError, ProviderError, ProviderErrorKind};
use crate::lease::{LeaseError, Lost, PACE};
use crate::storage::cipher_directory::{CipherDirectoryError, LockError};
use crate::transfer::TransferError;

/// The exit codes; `kmsfs --help` documents them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Other = 1,
    Usage = 2,
    CipherDirectory = 3,
    Config = 4,
    WrongVolume = 5,
    KeyRefused = 6,
    Credentials = 7,
    ProviderUnreachable = 8,
    MountPoint = 9,
    NoFuse = 10,
    Locked = 11,
    NotMounted = 12,
    Unauthentic = 13,
    Io = 14,
    Amiss = 15,
    Interrupted = 130,
}

impl Exit {
    /// All of them, in order.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 16] = [
        Self::Other,
        Self::Usage,
        Self::CipherDirectory,
        Self::Config,
        Self::WrongVolume,
        Self::KeyRefused,
        Self::Credentials,
        Self::ProviderUnreachable,
        Self::MountPoint,
        Self::NoFuse,
        Self::Locked,
        Self::NotMounted,
        Self::Unauthentic,
        Self::Io,
        Self::Amiss,
        Self::Interrupted,
    ];
}

/// A command's failure.
#[derive(Debug)]
pub(crate) struct CliError {
    code: u8,
    /// Empty if another process has said it already.
    message: String,
    hint: Option<String>,
}

impl CliError {
    /// A failure that is told as `message`.
    pub(crate) fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self::with_code(exit as u8, message)
    }

    /// A failure that is told as `message`, with the exit code of another.
    pub(crate) fn with_code(code: u8, message: impl fmt::Display) -> Self {
        Self { code, message: message.to_string(), hint: None }
    }

    /// A failure of which the background process has told.
    pub(crate) fn told(code: u8) -> Self {
        Self { code, message: String::new(), hint: None }
    }

    /// Wrong usage.
    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// A failure of an operating system call on `what`.
    pub(crate) fn io(what: impl fmt::Display, error: &io::Error) -> Self {
        Self::of(Exit::Io, what, error)
    }

    /// The same with another exit code.
    pub(crate) fn of(exit: Exit, what: impl fmt::Display, error: &io::Error) -> Self {
        let failure = Self::new(exit, format_args!("{what}: {error}"));
        if error.kind() == io::ErrorKind::PermissionDenied { failure.hint(who_may()) } else { failure }
    }

    /// The same, about `what`.
    pub(crate) fn about(self, what: impl fmt::Display) -> Self {
        Self { message: format!("{}: {}", report::printable(&what.to_string()), self.message), ..self }
    }

    /// Adds what to do about it.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// What to do about it, if that is known.
    pub(crate) fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The exit code as a number.
    pub(crate) fn code(&self) -> u8 {
        self.code
    }

    /// Tells on standard error what a command that succeeds would better not have met.
    pub(crate) fn warn(what: impl fmt::Display) {
        tell(&format!("{}kmsfs: warning: {what}", journal_priority("<4>")));
    }

    /// Tells it on standard error; to a journal, as the errors that its lines are.
    pub(crate) fn print(&self) {
        let priority = journal_priority("<3>");
        if !self.message.is_empty() {
            tell(&format!("{priority}kmsfs: {}", shown(&self.message)));
        }
        if let Some(hint) = &self.hint {
            tell(&format!("{priority}hint: {}", shown(hint)));
        }
    }
}

/// Whoever does not hear it still gets the exit code.
fn tell(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// What others named steers no terminal, and begins no line as if it were ours.
fn shown(text: &str) -> String {
    text.lines().map(report::printable).collect::<Vec<_>>().join("\n  ")
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

fn journal_priority(priority: &'static str) -> &'static str {
    if crate::daemon::log::stderr_is_journal() { priority } else { "" }
}

/// What to do where permission is denied.
fn who_may() -> String {
    let user = rustix::process::geteuid().as_raw();
    format!("this is user {user}: run it as the owner, or give this user access")
}

/// What to do where `/dev/fuse` cannot be opened.
pub(crate) fn device_hint(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
            "load the module (`modprobe fuse`); give a container the device (`--device /dev/fuse`)"
        }
        Some(Errno::PERM) => "give the container the device (`--device /dev/fuse`)",
        _ => "the device should have mode 0666: mend the udev rule, or `chmod 666 /dev/fuse`",
    }
}

/// The exit code of a failed provider call.
fn provider_exit(kind: ProviderErrorKind) -> Exit {
    match kind {
        ProviderErrorKind::Denied | ProviderErrorKind::KeyUnusable | ProviderErrorKind::KeyNotFound => Exit::KeyRefused,
        // A provider that answers nonsense cannot be used, whatever the reason.
        ProviderErrorKind::BadAnswer => Exit::KeyRefused,
        ProviderErrorKind::Credentials => Exit::Credentials,
        ProviderErrorKind::Unavailable | ProviderErrorKind::Throttled => Exit::ProviderUnreachable,
        ProviderErrorKind::Tampered => Exit::Config,
        ProviderErrorKind::Misconfigured => Exit::Usage,
        ProviderErrorKind::Storage => Exit::Io,
    }
}

impl From<ProviderError> for CliError {
    fn from(error: ProviderError) -> Self {
        Self::new(provider_exit(error.kind), error)
    }
}

impl From<KeyError> for CliError {
    fn from(error: KeyError) -> Self {
        let exit = match &error {
            KeyError::Locked => Exit::Locked,
            KeyError::Provider(error) => provider_exit(error.kind),
            KeyError::Config(_) | KeyError::BrokenSeal | KeyError::UnknownSuite(_) | KeyError::NoVolumeRecord(_) => {
                Exit::Config
            }
            KeyError::Header(_)
            | KeyError::UnauthenticHeader
            | KeyError::NoUsableRecord(_)
            | KeyError::Commitment(_) => Exit::Unauthentic,
        };
        Self::new(exit, error)
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        Self::new(Exit::Config, error)
    }
}

impl From<CipherDirectoryError> for CliError {
    fn from(error: CipherDirectoryError) -> Self {
        match &error {
            CipherDirectoryError::Io { path, error } => Self::io(path.display(), error),
            CipherDirectoryError::NotFound(path) => {
                let hint =
                    format!("name the directory that `kmsfs init` made; `kmsfs init {}` makes one", path.display());
                Self::new(Exit::CipherDirectory, error).hint(hint)
            }
            CipherDirectoryError::ConfigMissing(path) => {
                let hint = match path.join(".kmsfs/volume.toml.1").exists() {
                    true => {
                        format!("`kmsfs check --repair {}` puts its copy .kmsfs/volume.toml.1 back", path.display())
                    }
                    false => {
                        "restore .kmsfs/volume.toml from a backup: its copy .kmsfs/volume.toml.1 is gone too".to_owned()
                    }
                };
                Self::new(Exit::Config, error).hint(hint)
            }
            CipherDirectoryError::NotAVolume(path) => {
                let hint = format!("`kmsfs init {}` makes a volume in an empty directory", path.display());
                Self::new(Exit::CipherDirectory, error).hint(hint)
            }
            CipherDirectoryError::NotADirectory(_)
            | CipherDirectoryError::NotEmpty(_)
            | CipherDirectoryError::AlreadyAVolume(_) => Self::new(Exit::CipherDirectory, error),
        }
    }
}

impl From<ControlError> for CliError {
    fn from(error: ControlError) -> Self {
        let (exit, hint) = match &error {
            ControlError::NoDirectory => (Exit::Usage, "mount in another place".to_owned()),
            _ if !rustix::process::geteuid().is_root() => {
                let exit = if let ControlError::Io { .. } = error { Exit::Io } else { Exit::Usage };
                (exit, "give this user a directory for it: `export XDG_RUNTIME_DIR=$(mktemp -d)`".to_owned())
            }
            ControlError::UnsafeDirectory(path) | ControlError::LongPath(path) => {
                (Exit::Usage, format!("remove {} if nobody needs it: root's mounts make it anew", path.display()))
            }
            ControlError::Io { path, .. } => (Exit::Io, format!("let root make files in {}", path.display())),
        };
        Self::new(exit, format_args!("the control socket: {error}")).hint(hint)
    }
}

impl From<LockError> for CliError {
    fn from(error: LockError) -> Self {
        match &error {
            LockError::Held { volume, pid } => in_use::held(volume, *pid),
            LockError::Elsewhere { gone: false, .. } => Self::new(Exit::CipherDirectory, error).hint(
                "one mount at a time: unmount it there first; if nobody has it mounted, the backing \
                 filesystem still keeps the lock of a client that is gone (MooseFS: for SESSION_SUSTAIN_TIME, a day by default): \
                 remove that client's session on its server, or wait",
            ),
            LockError::Elsewhere { gone: true, .. } => Self::new(Exit::CipherDirectory, error).hint(
                "that process was one of this host and has ended; the backing filesystem keeps the lock of its dead client (MooseFS: \
                 for SESSION_SUSTAIN_TIME, a day by default): remove that client's session on its server, or wait",
            ),
            LockError::Io(_) => Self::new(Exit::Io, error),
        }
    }
}

impl From<Lost> for CliError {
    fn from(lost: Lost) -> Self {
        Self::new(Exit::CipherDirectory, format_args!("nothing more was written: {lost}"))
            .hint("find out who uses the volume; when they have ended, the same command goes on from here")
    }
}

impl From<LeaseError> for CliError {
    fn from(error: LeaseError) -> Self {
        match &error {
            LeaseError::Held(_) => Self::new(Exit::CipherDirectory, &error).hint(format_args!(
                "one mount at a time: unmount it there first, or end that process; its lease is \
                 taken over once it was not renewed for {} s",
                PACE.watch.as_secs()
            )),
            LeaseError::Nonsense => Self::new(Exit::CipherDirectory, &error)
                .hint("find out what writes that file and stop it; then remove the file, and try again"),
            LeaseError::Io(_) => Self::new(Exit::Io, &error)
                .hint("it says who writes the volume; if nobody does, on no host, it may be removed"),
        }
    }
}

#[cfg(feature = "mount")]
impl From<crate::mount::MountError> for CliError {
    fn from(error: crate::mount::MountError) -> Self {
        use crate::mount::MountError;
        let exit = match &error {
            MountError::NoDevice(_) | MountError::NoHelper(_) | MountError::Refused(_) => Exit::NoFuse,
            MountError::Place(_) => Exit::MountPoint,
            MountError::NoLatencyDevice(_) | MountError::NoOthers => Exit::Usage,
            MountError::NotMounted => Exit::NotMounted,
            MountError::Busy => Exit::Other,
            MountError::Session(_) => Exit::Io,
        };
        let hint = match &error {
            MountError::NoDevice(why) => Some(device_hint(why)),
            MountError::NoHelper(_) => Some("install the package fuse3, or mount as root"),
            MountError::NoOthers => Some("add the line user_allow_other to /etc/fuse.conf, or mount as root"),
            _ => None,
        };
        let failure = Self::new(exit, error);
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

/// For what is not done through a mount.
impl From<TransferError> for CliError {
    fn from(error: TransferError) -> Self {
        let exit = match error {
            TransferError::Volume(crate::fs::Error::Content(ContentError::Io(error))) => {
                return Self::io("the cipher directory", &error);
            }
            TransferError::Volume(error) => return error.into(),
            TransferError::Plain(_) | TransferError::Differs(_) => Exit::Io,
            TransferError::Names => Exit::Unauthentic,
            TransferError::EndMarks => Exit::Amiss,
            TransferError::Path => Exit::Usage,
            TransferError::Late => Exit::ProviderUnreachable,
            TransferError::Refused(_) => Exit::KeyRefused,
            TransferError::Changing
            | TransferError::InTheWay(_)
            | TransferError::LinkFailed(_)
            | TransferError::NamedElsewhere(_)
            | TransferError::NotFound
            | TransferError::Kind(_) => Exit::Other,
        };
        Self::new(exit, error)
    }
}

/// For a filesystem that does not open; what happens in an open one becomes an errno.
impl From<crate::fs::Error> for CliError {
    fn from(error: crate::fs::Error) -> Self {
        use crate::fs::Error;
        match error {
            Error::Io(error) => Self::io("the cipher directory", &error),
            Error::Key(error) => error.into(),
            Error::InUse(error) => error.into(),
            Error::Lease(lost) => lost.into(),
            Error::Unfinished => Self::new(Exit::Amiss, error).hint(
                "nothing is lost: mount the volume once, or run `kmsfs check --repair CIPHERDIR`, which finish it",
            ),
            Error::DirectoryId | Error::LinkTarget | Error::NoHeader | Error::Content(_) => {
                Self::new(Exit::Unauthentic, error)
            }
            other => Self::new(Exit::Other, other),
        }
    }
}
