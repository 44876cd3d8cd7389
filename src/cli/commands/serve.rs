//! From `kmsfs mount` to a served mount, in this process or in one that it leaves in the background.
//!
//! The order is the argument: usage, places, lock, config and pins come before a provider is asked; the sandbox closes before
//! there is a key; the volume is unlocked before anything is mounted; and nothing is remembered or logged before the mount is
//! usable.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::DirBuilder;
use std::io::{self, IsTerminal as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::SIGINT;

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::held_directory::HeldDirectory;
use crate::cli::key_spec::KeySpec;
use crate::cli::listed_key;
use crate::cli::mount_helper;
use crate::cli::mount_options::MountFlags;
use crate::cli::mount_point;
use crate::cli::passphrase::{self, Secret};
use crate::cli::pins::{Pin, Pins};
use crate::cli::reach;
use crate::cli::settings::{PASSPHRASE_VARIABLE, Settings};
use crate::cli::unlock::{self, Expected};
use crate::cli::watched::MountLimits;
use crate::cli::writing;
use crate::daemon::control::{self, Client, ControlSocket, Ended};
use crate::daemon::detach::{self, Background, Started};
use crate::daemon::inherited::{self, InheritedError};
use crate::daemon::log::{self, Format, Level, Target};
use crate::daemon::sandbox::{self, Confinement};
use crate::daemon::signals::SignalWatch;
use crate::daemon::take_modes_as_given;
use crate::format::config::VolumeConfig;
use crate::fs::{self, Filesystem};
use crate::keys::Volume;
use crate::keys::providers::ProviderSettings;
use crate::lease::Tenure;
use crate::mount::{self, Attendant, MountError};
use crate::storage::cipher_directory::{CipherDirectory, CipherDirectoryError, LockError, LockMode, VolumeLock};

use super::init;
use super::key_reload::KeyReload;
use super::mount::MountArgs;
use super::observe::Observers;
use super::serve_place::{advise_on_mode, refuse_mounted};
use super::serve_watch::{Sockets, announce, make_durable, tell_gaps, watch_signals};
use super::teller::{Teller, Told};

/// How long an earlier mount of the volume may take to end once it is unmounted.
const ITS_END: Duration = Duration::from_secs(20);

/// The addresses that a thread which serves the kernel takes: what it reads into, its stack, and 64 MiB that the allocator
/// sets aside for each thread.
const SERVING_THREAD: usize = 96 << 20;

/// Everything that is known before anything is touched.
struct Job<'a> {
    args: &'a MountArgs,
    flags: MountFlags,
    settings: Settings,
    environment: Environment,
}

/// Runs `kmsfs mount`; `background` says that this process is the one that stays.
pub(super) fn run(args: &MountArgs, background: bool) -> Result<(), CliError> {
    let environment = Environment::of_process();
    let flags = args.flags()?;
    let mut settings = Settings::load(&args.settings, &environment)?;
    settings.log_file = args.log_file.clone().or(settings.log_file);
    let job = Job { args, flags, settings, environment };
    let stays = inherited::set_aside(SERVING_THREAD * usize::from(args.threads)).map_err(|error| match error {
        InheritedError::Memory(_) => CliError::usage(error).hint("mount from a process without that limit"),
        InheritedError::Refused(_) => CliError::new(Exit::Other, error),
    })?;
    if !background {
        stays.iter().for_each(CliError::warn);
    }
    if background {
        let (background, secret) =
            Background::begin().map_err(|error| CliError::io("going to the background", &error))?;
        return job.serve(secret, Some(background));
    }
    let secret = job.read_passphrase()?;
    if args.foreground {
        return job.serve(secret, None);
    }
    // A program that gives credentials may need any of them.
    let all_variables = args.no_sandbox || reach::starts_programs(&job.environment);
    start_in_background(secret.as_ref(), all_variables)?;
    if job.flags.allow_other {
        advise_on_mode(&args.cipher_directory, &args.mountpoint);
    }
    Ok(())
}

/// Starts the process that stays, and waits until its mount is usable.
fn start_in_background(secret: Option<&Secret>, all_variables: bool) -> Result<(), CliError> {
    let command = mount_helper::as_command(env::args_os().collect()).into_iter().skip(1);
    let arguments: Vec<OsString> = ["--background".into()].into_iter().chain(command).collect();
    let secret = secret.map(|secret| secret.as_slice());
    let keeps = |name: &OsStr| name != PASSPHRASE_VARIABLE && (all_variables || reach::keeps_variable(name));
    let started = detach::start(&arguments, secret, keeps);
    match started.map_err(|error| CliError::io("starting the background process", &error))? {
        Started::Ready => Ok(()),
        Started::Failed(code) => Err(CliError::told(code)),
        Started::Killed(SIGINT) => Err(CliError::told(Exit::Interrupted as u8)),
        Started::Killed(signal) => {
            Err(CliError::new(Exit::Other, format_args!("the background process was killed by signal {signal}")))
        }
    }
}

/// A volume that is locked and unlocked, and the place where it goes.
struct Opened {
    directory: CipherDirectory,
    volume: Volume,
    lock: VolumeLock,
    tenure: Option<Tenure>,
    place: Place,
    attendant: Attendant,
    confinement: Confinement,
    expected_keys: Vec<KeySpec>,
    sockets: Sockets,
}

/// Where a mount logs to. The log of the user's choice hears everything; the usual one begins when the mount can be used,
/// so that one that never was leaves none.
struct Log {
    target: Target,
    /// Where it begins, if it does later.
    begins: Option<HeldDirectory>,
}

/// What is written outside of the volume once it is mounted, by way of directories that are held from before: a mount may lie
/// over them.
struct Records {
    log: Log,
    pin: Pin,
    pins: Result<Option<Pins>, CliError>,
}

/// Where a volume is mounted and where its process answers.
struct Place {
    cipher_directory: PathBuf,
    mountpoint: PathBuf,
    sockets: PathBuf,
}

impl Job<'_> {
    fn read_passphrase(&self) -> Result<Option<Secret>, CliError> {
        let Self { args, settings, environment, .. } = self;
        if io::stdin().is_terminal() {
            // Nobody types a passphrase for a place that cannot be mounted on.
            self.find_place()?;
        }
        if args.init && CipherDirectory::check_vacant(&args.cipher_directory).is_ok() {
            return init::read_passphrase(&args.volume, settings, environment);
        }
        let directory = CipherDirectory::open(&args.cipher_directory).ok();
        let sealed = directory.and_then(|directory| unlock::read_config(&directory).ok());
        passphrase::for_volume(settings, environment, sealed.as_ref().map(|sealed| &sealed.config))
    }

    fn serve(&self, secret: Option<Secret>, background: Option<Background>) -> Result<(), CliError> {
        let chosen = self.chosen_log(background.is_some())?;
        log::warn_terminal(background.is_some());
        self.start_log(chosen.as_ref().unwrap_or(&Target::Later))?;
        let mut observers = self.args.observe.observers()?;
        let mut providers = self.settings.for_providers(secret.map(passphrase::for_provider));
        providers.trail = observers.trail();
        let opened = self.open(&providers, &mut observers, chosen.is_none())?;
        drop(providers);
        observers.begin_audit(&opened.volume)?;
        let records = Records {
            log: chosen.map_or_else(|| self.usual_log(&opened.volume), |target| Ok(Log { target, begins: None }))?,
            pin: Pin::new(&opened.volume.id_text(), &opened.volume.fingerprint),
            pins: Pins::of(&self.environment).map(Pins::hold).transpose(),
        };
        let served = self.serve_opened(opened, &records, &mut observers, background);
        observers.end();
        served
    }

    /// The log of the user's choice; none if it is to be the usual one of a background mount.
    fn chosen_log(&self, background: bool) -> Result<Option<Target>, CliError> {
        let to_journal = self.settings.log_format == Some(Format::Journald);
        match &self.settings.log_file {
            Some(_) if to_journal => Err(CliError::usage(
                "a log file and the log format journald exclude each other: the journal is the log",
            )),
            None if to_journal => Ok(Some(Target::Journal)),
            Some(path) => {
                let path = std::path::absolute(path).map_err(|error| CliError::io(path.display(), &error))?;
                Ok(Some(Target::File(path)))
            }
            None if background => Ok(None),
            None => Ok(Some(Target::Stderr)),
        }
    }

    fn usual_log(&self, volume: &Volume) -> Result<Log, CliError> {
        let directory = self.log_directory()?;
        let held = HeldDirectory::make(&directory).map_err(|error| CliError::io(directory.display(), &error))?;
        Ok(Log { target: Target::File(directory.join(format!("{}.log", volume.id_text()))), begins: Some(held) })
    }

    fn log_directory(&self) -> Result<PathBuf, CliError> {
        self.environment.log_directory().ok_or_else(|| {
            CliError::usage("without HOME or XDG_STATE_HOME there is no place for a log").hint("use --log-file")
        })
    }

    fn start_log(&self, target: &Target) -> Result<(), CliError> {
        let level = self.settings.log_level.unwrap_or(Level::INFO);
        log::init(level, self.settings.log_format, target).map_err(|error| CliError::new(Exit::Io, error))?;
        if *target != Target::Stderr {
            log::panics();
        }
        Ok(())
    }

    /// Everything up to the unlocked volume. Nothing is changed, but for a volume that `--init` makes, and directories for
    /// what is written later.
    fn open(
        &self,
        providers: &ProviderSettings,
        observers: &mut Observers,
        logs_later: bool,
    ) -> Result<Opened, CliError> {
        let (place, held) = self.find_place()?;
        let Self { args, settings, environment, .. } = self;
        let makes = args.init && init::is_vacant(&place.cipher_directory)?;
        let places = [&*place.cipher_directory, &*place.mountpoint];
        if makes {
            observers.take_places(&places)?;
            let is_expected = |config: &VolumeConfig| self.check_expected(&place, config);
            let parts = (providers, environment);
            init::create_expected(&place.cipher_directory, &args.volume, settings, parts, is_expected)?;
        }
        let directory = CipherDirectory::open(&place.cipher_directory)?;
        let lock = self.lock(&directory, &place)?;
        if !makes {
            observers.take_places(&places)?;
        }
        let sealed = unlock::read_config(&directory)?;
        // Before the sandbox, which does not let keyrings be read that the volume does not name.
        let expected_keys = listed_key::expected(&args.expect_key, &sealed.config);
        let expected = Expected { volume_id: args.volume_id.as_deref(), keys: &expected_keys };
        let pins = Pins::of(environment);
        let attendant = Attendant::start(&self.mount_options(&place), held)
            .map_err(|error| CliError::io("starting the process that mounts", &error))?;
        let sockets = Sockets::make(args.foreground)?;
        let confinement = self.confine(&place, &sealed.config, observers, logs_later)?;
        let volume =
            unlock::unlock(directory.path(), &sealed, &expected, pins.as_ref(), providers, args.keys.limits())?;
        let tenure = writing::hold(&lock, self.lock_mode(), writing::seal(&volume))?;
        Ok(Opened { directory, volume, lock, tenure, place, attendant, confinement, expected_keys, sockets })
    }

    /// Whether a new volume with this config is the one that may be mounted.
    fn check_expected(&self, place: &Place, config: &VolumeConfig) -> Result<(), CliError> {
        let keys = listed_key::expected(&self.args.expect_key, config);
        let expected = Expected { volume_id: self.args.volume_id.as_deref(), keys: &keys };
        unlock::check_before_key(&place.cipher_directory, config, &expected, None).map(drop)
    }

    /// Gives up what the mount will not need. From here on nothing can be mounted, and only known places can be reached.
    fn confine(
        &self,
        place: &Place,
        config: &VolumeConfig,
        observers: &Observers,
        logs_later: bool,
    ) -> Result<Confinement, CliError> {
        if self.args.no_sandbox {
            return Ok(Confinement::off());
        }
        let environment = &self.environment;
        let remembered = Pins::of(environment).map(|pins| pins.get(&place.cipher_directory)).transpose()?.flatten();
        let logs = logs_later.then(|| self.log_directory()).transpose()?;
        let data = environment.data_directory().filter(|_| remembered.is_none());
        // What cannot be made is told by whoever needs it.
        for directory in [&logs, &data, &Some(place.sockets.clone())].into_iter().flatten() {
            let _ = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        }
        let places = reach::Places {
            cipher_directory: &place.cipher_directory,
            sockets: &place.sockets,
            logs: logs.as_deref(),
            watched: observers.directories(),
            is_new: remembered.is_none(),
        };
        Ok(sandbox::enter(&reach::of_mount(&places, config, &self.settings, environment)))
    }

    fn lock_mode(&self) -> LockMode {
        if self.flags.read_only { LockMode::Shared } else { LockMode::Exclusive }
    }

    /// Locks the volume. The process of an earlier mount that is unmounted already, and still makes everything durable, is waited
    /// for: umount(8) and an automount point do not wait for it.
    fn lock(&self, directory: &CipherDirectory, place: &Place) -> Result<VolumeLock, CliError> {
        let until = Instant::now() + ITS_END;
        let mut unknown = 0;
        let mut is_ending = |pid| {
            // Whoever held it a moment ago is gone.
            let Some(pid) = pid else {
                unknown += 1;
                return unknown < 5;
            };
            let is_mounted = mount::mounts().iter().any(|mount| mount.source == place.cipher_directory);
            Client::is_there(&place.sockets, pid) && !is_mounted
        };
        loop {
            match directory.lock(self.lock_mode()) {
                Err(LockError::Held { pid, .. }) if Instant::now() < until && is_ending(pid) => {
                    thread::sleep(Duration::from_millis(20));
                }
                locked => return Ok(locked?),
            }
        }
    }

    /// The place, and the directory that is to be mounted on.
    fn find_place(&self) -> Result<(Place, OwnedFd), CliError> {
        let path = &self.args.cipher_directory;
        let cipher_directory = mount_point::canonical_or_new(path).map_err(|error| match path.parent() {
            Some(above) if self.args.init && error.kind() == io::ErrorKind::NotFound => {
                init::no_place(path, CipherDirectoryError::NotFound(above.to_owned()))
            }
            _ => CliError::of(Exit::CipherDirectory, path.display(), &error),
        })?;
        refuse_mounted(&self.args.mountpoint, &cipher_directory)?;
        let ours = [self.environment.data_directory(), self.environment.log_directory()];
        let ours: Vec<PathBuf> = ours.into_iter().flatten().collect();
        let prepared = mount_point::prepare(&self.args.mountpoint, &cipher_directory, &ours, |dead| {
            mount::unmount(dead, true).map_err(CliError::from)
        })?;
        let runtime = self.environment.runtime_directory();
        let sockets = control::directory(runtime.as_deref(), &prepared.path)?;
        mount::check_rights(self.flags.allow_other, self.flags.low_latency)?;
        Ok((Place { cipher_directory, mountpoint: prepared.path, sockets }, prepared.directory))
    }

    fn serve_opened(
        &self,
        opened: Opened,
        records: &Records,
        observers: &mut Observers,
        background: Option<Background>,
    ) -> Result<(), CliError> {
        let Opened { directory, volume, lock, tenure, place, attendant, confinement, expected_keys, sockets } = opened;
        let attendant = Arc::new(attendant);
        let filesystem = Filesystem::open_held(directory, volume, self.fs_options(), tenure)?;
        let told = Told {
            mountpoint: &place.mountpoint,
            log: &records.log.target,
            observers,
            confinement: confinement.clone(),
            keys: self.key_reload(&place, expected_keys)?,
            limits: MountLimits::new(&self.args.keys.limits(), self.args.keys.idle_lock()),
        };
        let (end, ended) = mpsc::channel();
        let teller = Arc::new(Teller::new(&filesystem, told, end.clone()));
        let page = observers.take_page().map(|page| page.serve(teller.page()));
        let page = page.transpose().map_err(|error| CliError::io("the page of metrics", &error))?;
        let socket = ControlSocket::bind(sockets.control, &place.sockets, teller.answers())?;
        take_modes_as_given();
        let notifier = Arc::new(sockets.notifier);
        let mut usable = Ok(None);
        let mut watched = None;
        let options = self.mount_options(&place);
        let served = mount::serve(Arc::clone(&filesystem), &options, &attendant, (end, &ended), |device| {
            if let Err(error) = socket.name(device, &place.mountpoint) {
                tracing::warn!("the control socket is not found by the mount: {error}");
            }
            filesystem.sweep_keys();
            usable = self.usable(&place, records, background, &attendant);
            tell_gaps(&confinement);
            if usable.is_ok() {
                watched = announce(&notifier, &place.mountpoint);
            } else {
                // The error is the one to tell; without this the mount would stay, unknown to whoever asked for it.
                let _ = attendant.detach(true);
            }
        });
        drop(watched);
        notifier.stopping("making everything durable");
        drop(page);
        let durable = make_durable(&filesystem);
        observers.end();
        drop(lock);
        let lost = durable.as_ref().err().map(ToString::to_string);
        let ended = Ended { error: served.as_ref().err().map(MountError::to_string).or(lost) };
        tracing::info!(error = ended.error, "unmounted");
        // Those who wait see the end of the process, not of this function.
        std::mem::forget(socket.finish(&ended));
        served.map_err(CliError::from).and(usable.map(drop)).and(durable)
    }

    fn key_reload(&self, place: &Place, expected_keys: Vec<KeySpec>) -> Result<KeyReload, CliError> {
        Ok(KeyReload {
            directory: CipherDirectory::open(&place.cipher_directory)?,
            providers: self.settings.for_providers(None),
            expected_volume: self.args.volume_id.clone(),
            expected_keys,
        })
    }

    /// What follows once the mount can be used; the watch is to be kept as long as the mount.
    fn usable(
        &self,
        place: &Place,
        records: &Records,
        background: Option<Background>,
        attendant: &Arc<Attendant>,
    ) -> Result<Option<SignalWatch>, CliError> {
        let Records { log, pin, pins } = records;
        if let (Some(directory), Target::File(path)) = (&log.begins, &log.target) {
            let path = directory.path().join(path.file_name().unwrap_or_default());
            log::begin(&path).map_err(|error| CliError::new(Exit::Io, error))?;
        }
        let watch = watch_signals(&place.mountpoint, Arc::clone(attendant));
        init::remember(&place.cipher_directory, pin, pins.as_ref().map(Option::as_ref));
        tracing::info!(volume = pin.volume_id, mountpoint = %place.mountpoint.display(), "mounted");
        log::warn_terminal(false);
        if let Some(Err(error)) = background.map(Background::ready) {
            tracing::warn!("whoever started this mount has gone: {error}");
        }
        Ok(watch)
    }

    fn fs_options(&self) -> fs::Options {
        fs::Options {
            read_only: self.flags.read_only,
            idle_lock: self.args.keys.idle_lock(),
            prefetch: !self.args.keys.no_prefetch,
            provisioned_keys: self.args.keys.provisioned_keys(),
            keys_at_open: self.args.observe.may_withhold_keys(),
            xattrs: !self.flags.noxattr,
        }
    }

    fn mount_options(&self, place: &Place) -> mount::Options {
        let MountFlags { read_only, allow_other, suid, dev, noexec, noatime, noxattr: _, low_latency, vfs, remount: _ } =
            self.flags;
        mount::Options {
            mountpoint: place.mountpoint.clone(),
            source: place.cipher_directory.to_string_lossy().into_owned(),
            read_only,
            allow_other,
            suid,
            dev,
            exec: !noexec,
            noatime,
            low_latency,
            vfs: vfs.bits(),
            threads: self.args.threads.into(),
        }
    }
}
