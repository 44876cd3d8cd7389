//! Where the demonstration takes place: a directory of its own with a volume, a keyring and a mount, which are gone at the end,
//! whatever ended it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::cli::error::{CliError, Exit};
use crate::cli::mount_point;
use crate::cli::settings::Settings;
use crate::cli::unlock;
use crate::cli::writing;
use crate::crypto::random_array;
use crate::daemon::signals;
use crate::format::hex;
use crate::fs::{Filesystem, Options};
use crate::keys::volume::Unlocked;
use crate::keys::{KeyLimits, Recipient};
use crate::mount::{self, Attendant, MountError};
use crate::storage::cipher_directory::{CipherDirectory, LockMode, VolumeLock};

use super::provider::Watched;

/// How long the kernel may take to mount.
const MOUNTING: Duration = Duration::from_secs(60);
/// The volume's ciphertext, in the stage's directory.
const CIPHER: &str = "cipher";
/// And its mount point.
const PLAIN: &str = "plain";

/// What must be taken away, shared with the thread that hears of Ctrl-C.
struct Props {
    root: PathBuf,
    mounted: Mutex<Option<Arc<Attendant>>>,
    /// Ctrl-C, or another signal to end, was heard.
    interrupted: AtomicBool,
    /// Held while another command runs, or everything is taken away.
    busy: Mutex<()>,
}

impl Props {
    fn mounted(&self) -> std::sync::MutexGuard<'_, Option<Arc<Attendant>>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unmounts and removes everything, once nobody else does something here.
    fn clear(&self) {
        let _alone = self.busy.lock();
        if let Some(attendant) = self.mounted().take() {
            let _ = attendant.detach(true);
        }
        // Somebody may still be writing into it.
        for _ in 0..20 {
            match fs::remove_dir_all(&self.root) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => thread::sleep(Duration::from_millis(50)),
                _ => return,
            }
        }
    }
}

/// The place. Dropping it leaves nothing behind.
pub(super) struct Stage {
    props: Arc<Props>,
    variables: BTreeMap<&'static str, OsString>,
    settings: Settings,
    _signals: Option<signals::SignalWatch>,
}

/// A live mount of the volume, in this process.
pub(super) struct Live {
    pub(super) filesystem: Arc<Filesystem>,
    pub(super) provider: Arc<Watched>,
    attendant: Arc<Attendant>,
    session: JoinHandle<Result<(), MountError>>,
    props: Arc<Props>,
    _lock: VolumeLock,
}

impl Stage {
    /// An empty one, with `settings` for AWS KMS and no others of the user's.
    pub(super) fn new(mut settings: Settings) -> Result<Self, CliError> {
        settings.keyring = None;
        settings.passphrase = None;
        let name = format!("kmsfs-demo-{}", hex::encode(&random_array::<8>()));
        let root = std::env::temp_dir().join(name);
        let root = std::path::absolute(&root).map_err(|error| CliError::io(root.display(), &error))?;
        let props = Arc::new(Props {
            root,
            mounted: Mutex::default(),
            interrupted: AtomicBool::new(false),
            busy: Mutex::default(),
        });
        let stage = Self { variables: variables(&props.root, &settings), _signals: watch(&props), props, settings };
        for directory in [Path::new(""), Path::new(PLAIN)] {
            let path = stage.props.root.join(directory);
            let made = DirBuilder::new().mode(0o700).create(&path);
            made.map_err(|error| CliError::io(path.display(), &error).hint("TMPDIR names another place"))?;
        }
        // Takes the place of the user's settings.
        let empty = stage.path("settings.toml");
        fs::write(&empty, "").map_err(|error| CliError::io(empty.display(), &error))?;
        Ok(stage)
    }

    /// What a failure comes to: none of its own, if a signal has taken the stage away.
    pub(super) fn explain(&self, error: CliError) -> CliError {
        if self.props.interrupted.load(Ordering::SeqCst) { CliError::told(Exit::Interrupted as u8) } else { error }
    }

    /// A path in it.
    pub(super) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.props.root.join(name)
    }

    /// A path on the mount.
    pub(super) fn plain(&self, name: &str) -> PathBuf {
        self.path(PLAIN).join(name)
    }

    /// The volume's ciphertext.
    pub(super) fn cipher(&self) -> PathBuf {
        self.path(CIPHER)
    }

    /// Runs another command of this program, as a user would; returns what it prints.
    pub(super) fn kmsfs(&self, arguments: &[&OsStr]) -> Result<String, CliError> {
        let _busy = self.props.busy.lock();
        let output = Command::new("/proc/self/exe")
            .args(arguments)
            .envs(&self.variables)
            .env_remove("KMSFS_PASSPHRASE")
            .env_remove("KMSFS_PASSPHRASE_FILE")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| CliError::io("starting kmsfs", &error))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let code = output.status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(Exit::Other as u8);
        let why = said.trim().trim_start_matches("kmsfs: ").replace("\nhint:", "; hint:");
        Err(CliError::with_code(code, why))
    }

    /// Mounts the volume; a key's provider is asked again after `max_age`.
    pub(super) fn mount(&self, max_age: Duration) -> Result<Live, CliError> {
        let directory = CipherDirectory::open(&self.cipher())?;
        let lock = directory.lock(LockMode::Exclusive)?;
        let sealed = unlock::read_config(&directory)?;
        let providers = self.settings.for_providers(None);
        let recipient = unlock::recipients(&sealed.config, &providers).into_iter().next();
        let Recipient { kind, key, wraps_new, provider } =
            recipient.ok_or_else(|| CliError::new(Exit::Config, "the volume lists no key"))?;
        let provider = Arc::new(Watched::new(provider));
        let unlocked = Unlocked::open(&sealed, provider.as_ref(), Some(&key))?;
        let recipient = Recipient { kind, key, wraps_new, provider: Arc::clone(&provider) as _ };
        let volume = unlocked.volume(vec![recipient], KeyLimits { max_age, ..KeyLimits::default() });
        let options = Options { prefetch: false, ..Options::default() };
        let tenure = writing::hold(&lock, LockMode::Exclusive, writing::seal(&volume))?;
        let filesystem = Filesystem::open_held(directory, volume, options, tenure)?;
        self.serve(filesystem, provider, lock)
    }

    fn serve(&self, filesystem: Arc<Filesystem>, provider: Arc<Watched>, lock: VolumeLock) -> Result<Live, CliError> {
        let prepared = mount_point::prepare(&self.path(PLAIN), &self.cipher(), &[], |dead| {
            mount::unmount(dead, true).map_err(CliError::from)
        })?;
        let options = mount::Options {
            mountpoint: prepared.path,
            source: self.cipher().to_string_lossy().into_owned(),
            ..mount::Options::default()
        };
        let attendant = Attendant::start(&options, prepared.directory);
        let attendant = Arc::new(attendant.map_err(|error| CliError::io("starting the mount", &error))?);
        *self.props.mounted() = Some(Arc::clone(&attendant));
        let (ready, is_ready) = mpsc::channel();
        let served = (Arc::clone(&filesystem), Arc::clone(&attendant));
        let session = thread::Builder::new()
            .name("mount".to_owned())
            .spawn(move || {
                let (end, ended) = mpsc::channel();
                mount::serve(served.0, &options, &served.1, (end, &ended), |_| {
                    // Who waits no longer has given up.
                    let _ = ready.send(());
                })
            })
            .map_err(|error| CliError::io("a thread for the mount", &error))?;
        let live = Live { filesystem, provider, attendant, session, props: Arc::clone(&self.props), _lock: lock };
        match is_ready.recv_timeout(MOUNTING) {
            Ok(()) => Ok(live),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(live.end().err().unwrap_or_else(not_live)),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(not_live()),
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.props.clear();
    }
}

impl Live {
    /// Unmounts, and makes everything durable.
    pub(super) fn unmount(self) -> Result<(), CliError> {
        match self.attendant.detach(false) {
            Err(MountError::Busy) => self.attendant.detach(true)?,
            other => other?,
        }
        self.end()
    }

    fn end(self) -> Result<(), CliError> {
        let served = self.session.join().map_err(|_| CliError::new(Exit::Other, "the mount ended badly"))?;
        let durable = self.filesystem.shutdown().map_err(|error| CliError::new(Exit::Io, error));
        *self.props.mounted() = None;
        served.map_err(CliError::from).and(durable)
    }
}

fn not_live() -> CliError {
    CliError::new(Exit::NoFuse, "the mount did not become usable")
}

/// Ctrl-C, and a terminal that is closed, leave nothing behind either.
fn watch(props: &Arc<Props>) -> Option<signals::SignalWatch> {
    let props = Arc::clone(props);
    signals::on_end_request(move || {
        props.interrupted.store(true, Ordering::SeqCst);
        props.clear();
        std::process::exit(Exit::Interrupted as i32);
    })
    .ok()
}

/// Keeps other commands of this program to the stage, with the settings for AWS KMS.
fn variables(root: &Path, settings: &Settings) -> BTreeMap<&'static str, OsString> {
    let aws = &settings.aws;
    let mut variables: BTreeMap<&'static str, OsString> = BTreeMap::from([
        ("XDG_DATA_HOME", root.join("data").into()),
        ("XDG_STATE_HOME", root.join("state").into()),
        ("KMSFS_CONFIG", root.join("settings.toml").into()),
        // Empty ones count as absent.
        ("KMSFS_KEYRING", OsString::new()),
        ("KMSFS_REGION", aws.region.clone().unwrap_or_default().into()),
        ("KMSFS_ENDPOINT_URL", aws.endpoint.clone().unwrap_or_default().into()),
        ("KMSFS_KMS_ATTEMPT_TIMEOUT", aws.attempt_timeout.as_secs_f64().to_string().into()),
        ("KMSFS_KMS_OPERATION_TIMEOUT", aws.operation_timeout.as_secs_f64().to_string().into()),
    ]);
    variables.insert("KMSFS_FIPS", if aws.fips { "true" } else { "" }.into());
    variables
}
