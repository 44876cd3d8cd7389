//! Passphrases: from the terminal (only when asked to), a file, or the environment.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::keys::providers::Passphrase;

use super::environment::Environment;
use super::error::{CliError, Exit};
use super::settings::PASSPHRASE_VARIABLE;

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

impl PassphraseSource {
    /// Reads it. A `new` one is asked for twice.
    pub(crate) fn read(&self, environment: &Environment, new: bool) -> Result<Secret, CliError> {
        let secret = match self {
            Self::Terminal => from_terminal(new)?,
            Self::File(path) if path.as_os_str().is_empty() => {
                return Err(CliError::new(Exit::Credentials, "KMSFS_PASSPHRASE_FILE is empty"));
            }
            Self::File(path) if path == Path::new("-") => {
                let stdin = rustix::stdio::stdin().try_clone_to_owned().map(File::from);
                stdin.and_then(from_reader).map_err(|error| unreadable(path, &error))?
            }
            Self::File(path) => File::open(path).and_then(from_reader).map_err(|error| unreadable(path, &error))?,
            Self::Environment => {
                Zeroizing::new(environment.get(PASSPHRASE_VARIABLE).map(OsStringExt::into_vec).unwrap_or_default())
            }
        };
        if secret.is_empty() {
            let source = if *self == Self::Environment { PASSPHRASE_VARIABLE } else { "the passphrase" };
            return Err(CliError::new(Exit::Credentials, format_args!("{source} is empty")));
        }
        Ok(secret)
    }
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

fn from_terminal(new: bool) -> Result<Secret, CliError> {
    let failed = |error: io::Error| CliError::new(Exit::Credentials, format_args!("the terminal: {error}"));
    let mut terminal = QuietTerminal::open().map_err(|error| {
        failed(error).hint("--passphrase needs a terminal; use --passphrase-file or KMSFS_PASSPHRASE without one")
    })?;
    let first = terminal.ask(if new { "New passphrase: " } else { "Passphrase: " }).map_err(failed)?;
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
        tcsetattr(&file, OptionalActions::Flush, &quiet)?;
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
        let _ = tcsetattr(&self.file, OptionalActions::Flush, &self.before);
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
        let read = || PassphraseSource::File(path.clone()).read(&Environment::of(false, &[]), false);
        assert_eq!(read().unwrap_err().code(), Exit::Credentials as u8);
        fs::write(&path, "\n").unwrap();
        assert_eq!(read().unwrap_err().code(), Exit::Credentials as u8);
        fs::write(&path, "secret\n").unwrap();
        assert_eq!(**read().unwrap(), *b"secret");
    }

    #[test]
    fn the_environment_is_taken_as_it_is() {
        let environment = Environment::of(false, &[(PASSPHRASE_VARIABLE, "secret\n")]);
        assert_eq!(**PassphraseSource::Environment.read(&environment, true).unwrap(), *b"secret\n");
        let empty = Environment::of(false, &[(PASSPHRASE_VARIABLE, "")]);
        for source in [PassphraseSource::Environment, PassphraseSource::File(PathBuf::new())] {
            let refused = source.read(&empty, true).unwrap_err();
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
