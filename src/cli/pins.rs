//! Remembered volumes: which volume a cipher directory held when it was made or first mounted, kept outside of it. Whoever
//! can replace the whole cipher directory can offer a volume of his own; the pin is what he cannot replace.
//!
//! The file is `known-volumes.toml` in the user's data directory, mode 0600, replaced as a whole under a lock.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::format::hex;

use super::environment::Environment;
use super::error::{CliError, Exit};
use super::held_directory::HeldDirectory;

const FILE: &str = "known-volumes.toml";
const NEW_FILE: &str = "known-volumes.toml.new";

/// What is remembered of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Pin {
    /// Its id, a UUID.
    pub(crate) volume_id: String,
    /// Names its volume key, in hexadecimal.
    pub(crate) fingerprint: String,
}

impl Pin {
    /// The pin of a volume.
    pub(crate) fn new(volume_id: &str, fingerprint: &[u8; 16]) -> Self {
        Self { volume_id: volume_id.to_owned(), fingerprint: hex::encode(fingerprint) }
    }
}

/// A pin, and the file that has it.
#[derive(Clone, Debug)]
pub(crate) struct Remembered {
    pub(crate) pin: Pin,
    file: PathBuf,
}

impl Remembered {
    /// Whether the volume at `directory` has the remembered id.
    pub(crate) fn check_volume(&self, directory: &Path, found: &str) -> Result<(), CliError> {
        self.check("volume", directory, &self.pin.volume_id, found)
    }

    /// Whether its volume key has the remembered fingerprint.
    pub(crate) fn check_fingerprint(&self, directory: &Path, found: &[u8; 16]) -> Result<(), CliError> {
        self.check("key fingerprint", directory, &self.pin.fingerprint, &hex::encode(found))
    }

    fn check(&self, what: &str, directory: &Path, expected: &str, found: &str) -> Result<(), CliError> {
        check(what, directory, expected, found).map_err(|error| {
            error.hint(format_args!(
                "{} remembers another volume there; only if you replaced it yourself: `kmsfs forget {}`",
                self.file.display(),
                directory.display()
            ))
        })
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    #[serde(default)]
    volumes: BTreeMap<String, Pin>,
}

/// The user's remembered volumes.
#[derive(Debug)]
pub(crate) struct Pins {
    directory: PathBuf,
    held: Option<HeldDirectory>,
}

impl Pins {
    /// Those of this user; none if there is no place to keep them.
    pub(crate) fn of(environment: &Environment) -> Option<Self> {
        environment.data_directory().map(|directory| Self { directory, held: None })
    }

    /// The same, found from now on whatever is mounted over their place.
    pub(crate) fn hold(self) -> Result<Self, CliError> {
        let held = HeldDirectory::make(&self.directory);
        let held = held.map_err(|error| CliError::io(self.directory.display(), &error))?;
        Ok(Self { held: Some(held), ..self })
    }

    /// What is remembered of the canonical cipher directory.
    pub(crate) fn get(&self, cipher_directory: &Path) -> Result<Option<Remembered>, CliError> {
        let pin = self.load()?.volumes.remove(&key(cipher_directory));
        Ok(pin.map(|pin| Remembered { pin, file: self.path() }))
    }

    /// Remembers `pin`; one that is the same already is left alone.
    pub(crate) fn set(&self, cipher_directory: &Path, pin: Pin) -> Result<(), CliError> {
        if self.get(cipher_directory)?.is_some_and(|known| known.pin == pin) {
            return Ok(());
        }
        self.change(|known| known.volumes.insert(key(cipher_directory), pin)).map(drop)
    }

    /// Forgets a cipher directory; returns whether it was remembered.
    pub(crate) fn forget(&self, cipher_directory: &Path) -> Result<bool, CliError> {
        if self.get(cipher_directory)?.is_none() {
            return Ok(false);
        }
        self.change(|known| known.volumes.remove(&key(cipher_directory))).map(|before| before.is_some())
    }

    /// The file, as it is called.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join(FILE)
    }

    /// Where it is found.
    fn place(&self) -> PathBuf {
        self.held.as_ref().map_or_else(|| self.directory.clone(), HeldDirectory::path)
    }

    /// A file that is there but cannot be understood stops everything: ignoring it would turn the pins off.
    fn load(&self) -> Result<Known, CliError> {
        let path = self.path();
        match fs::read_to_string(self.place().join(FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Known::default()),
            Err(error) => Err(CliError::io(path.display(), &error)),
            Ok(text) => toml::from_str(&text).map_err(|error| {
                let what = format!("{}:\n{}", path.display(), error.to_string().trim_end());
                CliError::new(Exit::WrongVolume, what).hint(
                    "the remembered volumes are damaged: repair the file, or remove it and trust all volumes anew",
                )
            }),
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Known) -> T) -> Result<T, CliError> {
        let failed = |error: io::Error| CliError::io(self.path().display(), &error);
        let place = self.place();
        DirBuilder::new().recursive(true).mode(0o700).create(&place).map_err(failed)?;
        let directory = File::open(&place).map_err(failed)?;
        // Whoever else holds it is writing a small file.
        rustix::fs::flock(&directory, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
        let mut known = self.load()?;
        let result = change(&mut known);
        let text = toml::to_string(&known).map_err(|error| CliError::new(Exit::Other, error))?;
        self.replace(&directory, &text).map_err(failed)?;
        Ok(result)
    }

    fn replace(&self, directory: &File, text: &str) -> io::Result<()> {
        let new = self.place().join(NEW_FILE);
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, self.place().join(FILE))?;
        directory.sync_all()
    }
}

/// A path as a key of a TOML table. Absolute paths begin with a slash, so the two forms never meet.
fn key(cipher_directory: &Path) -> String {
    cipher_directory
        .to_str()
        .map_or_else(|| format!("hex:{}", hex::encode(cipher_directory.as_os_str().as_bytes())), str::to_owned)
}

/// Checks what is known of the volume at `cipher_directory` against what it says of itself.
pub(crate) fn check(what: &str, cipher_directory: &Path, expected: &str, found: &str) -> Result<(), CliError> {
    if expected == found {
        return Ok(());
    }
    let path = cipher_directory.display();
    Err(CliError::new(
        Exit::WrongVolume,
        format_args!("{path} is not the expected volume: expected {what} {expected}, found {found}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::fs::PermissionsExt;

    fn pins(home: &Path) -> Pins {
        Pins { directory: home.join("share/kmsfs"), held: None }
    }

    #[test]
    fn remembers_and_forgets() {
        let home = tempfile::tempdir().unwrap();
        let pins = pins(home.path());
        let odd = Path::new(OsStr::from_bytes(b"/odd \"path\"\n\xff"));
        let (first, second) = (Pin::new("first", &[1; 16]), Pin::new("second", &[2; 16]));
        let get = |path: &Path| pins.get(path).unwrap().map(|known| known.pin);
        assert_eq!(get(odd), None);
        pins.set(Path::new("/a.b c"), first.clone()).unwrap();
        pins.set(odd, second.clone()).unwrap();
        assert_eq!((get(Path::new("/a.b c")), get(odd)), (Some(first), Some(second)));
        assert!(pins.forget(odd).unwrap());
        assert!(!pins.forget(odd).unwrap());
        assert_eq!(get(odd), None);
        assert_eq!(fs::metadata(pins.path()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&pins.directory).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_file_is_not_ignored() {
        let home = tempfile::tempdir().unwrap();
        let pins = pins(home.path());
        pins.set(Path::new("/a"), Pin::new("v", &[1; 16])).unwrap();
        fs::write(pins.path(), "[volumes\n").unwrap();
        assert_eq!(pins.get(Path::new("/a")).unwrap_err().code(), Exit::WrongVolume as u8);
        assert!(pins.set(Path::new("/b"), Pin::new("v", &[1; 16])).is_err());
        assert_eq!(fs::read_to_string(pins.path()).unwrap(), "[volumes\n");
    }

    #[test]
    fn writers_at_the_same_time_lose_nothing() {
        let home = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for number in 0_u8..8 {
                let pins = pins(home.path());
                scope.spawn(move || {
                    pins.set(Path::new(&format!("/{number}")), Pin::new("v", &[number; 16])).unwrap();
                });
            }
        });
        assert_eq!(pins(home.path()).load().unwrap().volumes.len(), 8);
    }

    #[test]
    fn a_mismatch_shows_both() {
        let known = Remembered { pin: Pin::new("aaa", &[1; 16]), file: PathBuf::from("/d/known-volumes.toml") };
        known.check_volume(Path::new("/c"), "aaa").unwrap();
        let error = known.check_volume(Path::new("/c"), "bbb").unwrap_err();
        assert_eq!(error.code(), Exit::WrongVolume as u8);
        for shown in ["/c", "aaa", "bbb"] {
            assert!(error.to_string().contains(shown));
        }
        assert!(format!("{error:?}").contains("/d/known-volumes.toml remembers"), "{error:?}");
    }
}
