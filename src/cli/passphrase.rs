//! Passphrases: from a file, the environment or the terminal.
//!
//! Invariant: nobody is asked who does not sit at a terminal, nor where a key without a passphrase may unlock the volume.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::format::config::VolumeConfig;
use crate::keys::ProviderKind;
use crate::keys::providers::{self, Passphrase};
use crate::keys::volume;

use super::environment::Environment;
use super::error::{CliError, Exit};
use super::report;
use super::settings::{PASSPHRASE_VARIABLE, Settings};

/// The longest passphrase.
const MAX_LEN: usize = 16384;
/// What the interrupt, end-of-file and erase keys send.
const INTERRUPT: u8 = 3;
const END: u8 = 4;
const ERASE: [u8; 2] = [8, 127];

/// The bytes of a passphrase, wiped on drop.
pub(crate) type Secret = Zeroizing<Vec<u8>>;

/// Where a passphrase comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PassphraseSource {
    /// A prompt, without echo.
    Terminal,
    /// A file; `-` is standard input.
    File(PathBuf),
    /// `KMSFS_PASSPHRASE`.
    Environment,
}

/// The passphrase for a volume with this config, if one is given. Else a person is asked if every key that can unlock the volume
/// here is in a sealed keyring.
pub(crate) fn for_volume(
    settings: &Settings,
    environment: &Environment,
    config: Option<&VolumeConfig>,
) -> Result<Option<Secret>, CliError> {
    let keys = config.map(volume::keys_that_can_unlock).unwrap_or_default();
    let is_local = |kind: &ProviderKind| *kind == ProviderKind::Local;
    let has_identity = settings.age.identity_file.is_some();
    let is_usable = |kind: &ProviderKind| *kind != ProviderKind::Age || has_identity;
    let others = keys.iter().any(|(kind, _)| !is_local(kind) && is_usable(kind));
    let places = keys.iter().filter(|(kind, _)| is_local(kind));
    let places = places.filter_map(|(_, key)| settings.keyring.clone().or(key.location.clone().map(PathBuf::from)));
    let (mut sealed, mut open, mut first) = (None, false, None);
    for place in places {
        match providers::is_sealed(&place) {
            Ok(true) => _ = sealed.get_or_insert_with(|| place.clone()),
            Ok(false) => open = true,
            Err(_) => {}
        }
        first.get_or_insert(place);
    }
    match &settings.passphrase {
        Some(source) => source.read(environment, sealed.or(first).as_deref(), false).map(Some),
        None => sealed.filter(|_| !open && !others).map_or(Ok(None), |keyring| ask(&keyring)),
    }
}

/// The passphrase for the keyring at `path`, if one is given; for a `new` one, which is asked for twice. Else a person is asked
/// if the keyring is sealed.
pub(crate) fn for_keyring(
    settings: &Settings,
    environment: &Environment,
    path: &Path,
    new: bool,
) -> Result<Option<Secret>, CliError> {
    match &settings.passphrase {
        Some(source) => source.read(environment, Some(path), new).map(Some),
        None if new || !providers::is_sealed(path).unwrap_or(false) => Ok(None),
        None => ask(path),
    }
}

/// Asks a person for the passphrase of the keyring at `path`; nobody without one.
pub(crate) fn ask(path: &Path) -> Result<Option<Secret>, CliError> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Ok(None);
    }
    from_terminal(Some(path), false).and_then(|secret| not_empty(secret, "the passphrase")).map(Some)
}

impl PassphraseSource {
    /// Reads the passphrase of `keyring`. A `new` one is asked for twice.
    pub(crate) fn read(
        &self,
        environment: &Environment,
        keyring: Option<&Path>,
        new: bool,
    ) -> Result<Secret, CliError> {
        let secret = match self {
            Self::Terminal => from_terminal(keyring, new)?,
            Self::File(path) if path.as_os_str().is_empty() => {
                return Err(CliError::new(Exit::Credentials, "KMSFS_PASSPHRASE_FILE is empty"));
            }
            Self::File(path) if path == Path::new("-") => {
                let stdin = rustix::stdio::stdin().try_clone_to_owned().map(File::from);
                stdin.and_then(from_reader).map_err(|error| unreadable(path, &error))?
            }
            Self::File(path) => {
                let file = File::open(path).map_err(|error| unreadable(path, &error))?;
                check_readers(path, &file)?;
                from_reader(file).map_err(|error| unreadable(path, &error))?
            }
            Self::Environment => {
                Zeroizing::new(environment.get(PASSPHRASE_VARIABLE).map(OsStringExt::into_vec).unwrap_or_default())
            }
        };
        not_empty(secret, if *self == Self::Environment { PASSPHRASE_VARIABLE } else { "the passphrase" })
    }
}

fn not_empty(secret: Secret, source: &str) -> Result<Secret, CliError> {
    if secret.is_empty() {
        return Err(CliError::new(Exit::Credentials, format_args!("{source} is empty")));
    }
    Ok(secret)
}

/// A file that others can read keeps nothing secret. Its group may read what another user, such as the service manager, gives to
/// this one; a descriptor that was handed over, and a pipe, are whoever's opened them.
fn check_readers(path: &Path, file: &File) -> Result<(), CliError> {
    let found = file.metadata().map_err(|error| unreadable(path, &error))?;
    let is_descriptor =
        path == Path::new("/dev/stdin") || path.starts_with("/dev/fd") || path.starts_with("/proc/self/fd");
    let is_ours = found.uid() == rustix::process::geteuid().as_raw();
    let others = if is_ours { 0o077 } else { 0o027 };
    if !found.is_file() || is_descriptor || found.mode() & others == 0 {
        return Ok(());
    }
    let mode = found.mode() & 0o7777;
    let what = format!("the passphrase file {} has mode {mode:04o}, so that others can use it", path.display());
    Err(CliError::new(Exit::Credentials, what).hint(format_args!(
        "chmod 600 {}; where it is a container's secret, declare it with mode 0400",
        path.display()
    )))
}

/// The passphrase in the form the providers take.
pub(crate) fn for_provider(mut secret: Secret) -> Passphrase {
    Passphrase::new(std::mem::take(&mut *secret))
}

fn unreadable(path: &Path, error: &io::Error) -> CliError {
    CliError::new(Exit::Credentials, format_args!("the passphrase file {}: {error}", path.display()))
}

/// All of `reader` without one newline at the end.
fn from_reader(reader: impl Read) -> io::Result<Secret> {
    let mut secret = Zeroizing::new(Vec::with_capacity(MAX_LEN + 1));
    reader.take(MAX_LEN as u64 + 1).read_to_end(&mut secret)?;
    if secret.len() > MAX_LEN {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("longer than {MAX_LEN} bytes")));
    }
    if secret.last() == Some(&b'\n') {
        secret.pop();
    }
    Ok(secret)
}

fn from_terminal(keyring: Option<&Path>, new: bool) -> Result<Secret, CliError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::Interrupted => CliError::new(Exit::Interrupted, "interrupted"),
        _ => CliError::new(Exit::Credentials, format_args!("the terminal: {error}")),
    };
    let mut terminal = QuietTerminal::open().map_err(|error| {
        failed(error).hint("--passphrase needs a terminal; use --passphrase-file or KMSFS_PASSPHRASE without one")
    })?;
    let of = keyring.map(|path| format!(" of the keyring {}", path.display())).unwrap_or_default();
    let prompt = format!("{}{of}: ", if new { "New passphrase" } else { "Passphrase" });
    let first = terminal.ask(&report::printable(&prompt)).map_err(failed)?;
    if new && *terminal.ask("The same again: ").map_err(failed)? != *first {
        return Err(CliError::new(Exit::Credentials, "the two passphrases differ"));
    }
    Ok(first)
}

/// The terminal, without echo for as long as this lives.
struct QuietTerminal {
    file: File,
    before: Termios,
}

impl QuietTerminal {
    fn open() -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/tty")?;
        let before = tcgetattr(&file)?;
        let mut quiet = before.clone();
        // Without ISIG an interrupt comes as a byte, so that nothing can end the process and leave the echo off.
        quiet.local_modes -= LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG;
        // Input that arrives before the prompt counts: programs send it, and people type ahead.
        tcsetattr(&file, OptionalActions::Now, &quiet)?;
        Ok(Self { file, before })
    }

    fn ask(&mut self, prompt: &str) -> io::Result<Secret> {
        self.file.write_all(prompt.as_bytes())?;
        let line = read_line(&mut self.file);
        self.file.write_all(b"\n")?;
        line
    }
}

impl Drop for QuietTerminal {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = tcsetattr(&self.file, OptionalActions::Drain, &self.before);
    }
}

/// A line as it is typed, with the erase key's effect.
fn read_line(terminal: &mut impl Read) -> io::Result<Secret> {
    let mut line = Zeroizing::new(Vec::with_capacity(MAX_LEN));
    loop {
        let mut key = [0];
        if terminal.read(&mut key)? == 0 {
            return Ok(line);
        }
        match key[0] {
            b'\n' | b'\r' | END => return Ok(line),
            INTERRUPT => return Err(io::Error::new(io::ErrorKind::Interrupted, "interrupted")),
            byte if ERASE.contains(&byte) => erase(&mut line),
            byte if line.len() < MAX_LEN => line.push(byte),
            _ => {}
        }
    }
}

/// Takes the last character off: its continuation bytes, then its first one.
fn erase(line: &mut Vec<u8>) {
    while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_file_loses_one_newline_only() {
        for (content, expected) in [("a b\n", "a b"), ("a\n\n", "a\n"), ("a\r\n", "a\r"), (" a ", " a ")] {
            assert_eq!(*from_reader(content.as_bytes()).unwrap(), expected.as_bytes());
        }
        from_reader([b'x'; MAX_LEN].as_slice()).unwrap();
        from_reader([b'x'; MAX_LEN + 1].as_slice()).unwrap_err();
    }

    #[test]
    fn missing_and_empty_ones_are_credential_errors() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("passphrase");
        let read = || PassphraseSource::File(path.clone()).read(&Environment::of(false, &[]), None, false);
        assert_eq!(read().unwrap_err().code(), Exit::Credentials as u8);
        let write = |content: &str| {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        };
        write("\n");
        assert_eq!(read().unwrap_err().code(), Exit::Credentials as u8);
        write("secret\n");
        assert_eq!(**read().unwrap(), *b"secret");
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_and_what_is_handed_over_is_not() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("passphrase");
        fs::write(&path, "secret\n").unwrap();
        let read = |path: &Path| PassphraseSource::File(path.into()).read(&Environment::of(false, &[]), None, false);
        for (mode, good) in [(0o600, true), (0o400, true), (0o440, false), (0o640, false), (0o604, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let answer = read(&path);
            assert_eq!(answer.is_ok(), good, "{mode:o}");
            if let Err(error) = answer {
                assert!(error.code() == Exit::Credentials as u8 && error.to_string().contains("has mode"), "{error}");
            }
        }
        let open = File::open(&path).unwrap();
        for directory in ["/dev/fd", "/proc/self/fd"] {
            assert_eq!(**read(&Path::new(directory).join(open.as_raw_fd().to_string())).unwrap(), *b"secret");
        }
        // A service manager gives a user what stays its own (an access list shows as the group's bits).
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            for (mode, good) in [(0o440, true), (0o460, false), (0o444, false)] {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
                assert_eq!(read(&path).is_ok(), good, "{mode:o}");
            }
        }
    }

    #[test]
    fn the_environment_is_taken_as_it_is() {
        let environment = Environment::of(false, &[(PASSPHRASE_VARIABLE, "secret\n")]);
        assert_eq!(**PassphraseSource::Environment.read(&environment, None, true).unwrap(), *b"secret\n");
        let empty = Environment::of(false, &[(PASSPHRASE_VARIABLE, "")]);
        for source in [PassphraseSource::Environment, PassphraseSource::File(PathBuf::new())] {
            let refused = source.read(&empty, None, true).unwrap_err();
            assert_eq!(refused.code(), Exit::Credentials as u8);
            assert!(refused.to_string().contains(PASSPHRASE_VARIABLE), "{refused}");
        }
    }

    #[test]
    fn typed_lines_can_be_corrected_and_interrupted() {
        assert_eq!(**read_line(&mut "ab\u{e9}\u{7f}\u{7f}c\nrest".as_bytes()).unwrap(), *b"ac");
        assert_eq!(**read_line(&mut "\u{7f}x\r".as_bytes()).unwrap(), *b"x");
        assert_eq!(read_line(&mut "ab\u{3}".as_bytes()).unwrap_err().kind(), io::ErrorKind::Interrupted);
    }
}
