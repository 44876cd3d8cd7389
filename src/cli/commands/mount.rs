//! `kmsfs mount`: its arguments; what they start is in `serve`.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::cli::error::CliError;
use crate::cli::key_spec::KeySpec;
use crate::cli::mount_options::MountFlags;
use crate::cli::settings::SettingsArgs;
use crate::cli::span::Span;
use crate::format::hex;
use crate::keys::{KeyLimits, ProvisionedUse};

use super::init::NewVolumeArgs;
use super::observe::ObserveArgs;

/// Mount a volume; returns when it is usable, or says why it is not
#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    pub(super) cipher_directory: PathBuf,
    /// An empty directory, outside of CIPHERDIR
    pub(super) mountpoint: PathBuf,
    /// Make the volume first if CIPHERDIR is missing or empty
    #[arg(long)]
    pub(super) init: bool,
    /// Stay in the foreground, and log to standard error
    #[arg(long, short)]
    pub(super) foreground: bool,
    /// Refuse every change; several read-only mounts of one volume are possible
    #[arg(long)]
    read_only: bool,
    /// Mount options: ro, rw, allow_other, suid, nosuid, dev, nodev, exec, noexec, noatime, relatime, xattr, noxattr,
    /// lowlatency, nolowlatency; remount changes them for a mount that is there
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Mount only the volume with this id
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    pub(super) volume_id: Option<String>,
    /// Mount only if no other key than this one (given again: these) protects the volume
    #[arg(long, value_name = "PROVIDER:KEYID")]
    pub(super) expect_key: Vec<KeySpec>,
    /// Log to this file
    #[arg(long, value_name = "FILE")]
    pub(super) log_file: Option<PathBuf>,
    /// Do not confine the mount's process to the files and system calls that it needs
    #[arg(long)]
    pub(super) no_sandbox: bool,
    /// Threads that serve the kernel
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(super) threads: u8,
    #[command(flatten)]
    pub(super) keys: KeyLimitArgs,
    #[command(flatten)]
    pub(super) observe: ObserveArgs,
    #[command(flatten)]
    pub(super) volume: NewVolumeArgs,
    #[command(flatten)]
    pub(super) settings: SettingsArgs,
}

/// How long unwrapped keys are kept.
#[derive(Debug, Args)]
#[command(next_help_heading = "Keys")]
pub(super) struct KeyLimitArgs {
    /// Ask the key's provider again after so long (seconds, or with a unit as in 90s, 30m or 1h), for open files too: a
    /// revoked key takes effect within it
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = Span::at_least_a_second)]
    key_max_age: Span,
    /// Keep so many unwrapped keys at most
    #[arg(long, value_name = "KEYS", default_value_t = 16384, value_parser = clap::value_parser!(u32).range(1..))]
    key_cache: u32,
    /// Use a key so much longer while its provider cannot be reached
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    stale_grace: Span,
    /// Make so many calls of the key's provider a second at most
    #[arg(long, value_name = "CALLS")]
    kms_rate: Option<NonZeroU32>,
    /// Do not fetch the keys of files that will probably be opened next
    #[arg(long)]
    pub(super) no_prefetch: bool,
    /// When new files use the keys that `kmsfs keys provision` made
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    provisioned_keys: ProvisionedChoice,
    /// Drop all keys, as `kmsfs lock` does, after so long without use
    #[arg(long, value_name = "DURATION", value_parser = Span::at_least_a_second)]
    idle_lock: Option<Span>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum ProvisionedChoice {
    /// If the provider refuses to make a data key
    #[default]
    Fallback,
    /// Always
    Only,
    /// Not at all
    Never,
}

impl KeyLimitArgs {
    pub(super) fn provisioned_keys(&self) -> ProvisionedUse {
        match self.provisioned_keys {
            ProvisionedChoice::Fallback => ProvisionedUse::Fallback,
            ProvisionedChoice::Only => ProvisionedUse::Only,
            ProvisionedChoice::Never => ProvisionedUse::Never,
        }
    }

    pub(super) fn limits(&self) -> KeyLimits {
        let entries = usize::try_from(self.key_cache).ok().and_then(NonZeroUsize::new);
        KeyLimits {
            entries: entries.unwrap_or(NonZeroUsize::MIN),
            max_age: self.key_max_age.0,
            stale_grace: self.stale_grace.0,
            calls_per_second: self.kms_rate,
        }
    }

    pub(super) fn idle_lock(&self) -> Option<Duration> {
        self.idle_lock.map(|span| span.0)
    }
}

impl MountArgs {
    /// The mount options, from all flags.
    pub(super) fn flags(&self) -> Result<MountFlags, CliError> {
        if self.volume.given() && !self.init {
            return Err(CliError::usage("the options of a new volume need --init"));
        }
        let flags = MountFlags::parse(&self.options)?;
        Ok(MountFlags { read_only: flags.read_only || self.read_only, ..flags })
    }
}

fn uuid(text: &str) -> Result<String, &'static str> {
    let text = text.to_ascii_lowercase();
    hex::decode_uuid(&text).map(|_| text).ok_or("not a UUID")
}

/// Mounts.
#[cfg(feature = "mount")]
pub(crate) fn run(args: &MountArgs, background: bool) -> Result<(), CliError> {
    if args.flags()?.remount {
        return super::remount::run(&args.mountpoint, &args.options);
    }
    super::serve::run(args, background)
}

/// Mounts.
#[cfg(not(feature = "mount"))]
pub(crate) fn run(args: &MountArgs, _background: bool) -> Result<(), CliError> {
    Err(not_built_in(&args.mountpoint))
}

/// What a program without FUSE says.
#[cfg(not(feature = "mount"))]
pub(super) fn not_built_in(mountpoint: &std::path::Path) -> CliError {
    use crate::cli::error::Exit;
    let what = format!("{}: this kmsfs was built without FUSE", mountpoint.display());
    CliError::new(Exit::NoFuse, what).hint("build it with the feature `mount`")
}
