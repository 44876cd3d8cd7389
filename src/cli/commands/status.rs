//! `kmsfs status`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

#[cfg(feature = "mount")]
use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::settings::SettingsArgs;
use crate::cli::{mount_point, report};
use crate::daemon::control::{Ask, Client, ClientError};

use super::{check_paths, keys_list, keys_usage};

/// How long a mount may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Show what is mounted, how much of it is in use, and how the keys fare
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// The mount point [default: a list of all mounts]
    mountpoint: Option<PathBuf>,
    /// Show the volume's wrapping keys instead, and how many files still need each of them, as `kmsfs keys list --files` does
    #[arg(long, requires = "mountpoint")]
    keys: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Shows it.
pub(crate) fn run(args: &StatusArgs) -> Result<(), CliError> {
    let Some(mountpoint) = &args.mountpoint else { return report::print(&mounts(), args.json) };
    let mountpoint = canonical(mountpoint)?;
    if args.keys {
        let volumes = check_paths::volumes(std::slice::from_ref(&mountpoint))?;
        return volumes.iter().try_for_each(|(cipher_directory, _)| {
            let (due_after, settings) = (keys_usage::DUE_AFTER_DAYS, SettingsArgs::default());
            keys_list::list_volume(cipher_directory, true, due_after, args.json, &settings)
        });
    }
    let status = connect(&mountpoint)
        .and_then(|client| client.tell(Ask::Status, DEADLINE))
        .map_err(|e| failure(&mountpoint, &e))?;
    report::print_json(&status, args.json)
}

/// A mount in the list of all.
#[derive(Serialize)]
struct Listed {
    mountpoint: PathBuf,
    cipher_directory: PathBuf,
    /// Who mounted it.
    user: u32,
    /// The process behind it, if it answers this user.
    process: Option<u64>,
}

/// All mounts that this process sees.
#[cfg(feature = "mount")]
fn mounts() -> Vec<Listed> {
    let process = |mount: &crate::mount::Found| {
        let answer = connect_to(mount).and_then(|client| client.tell(Ask::Status, DEADLINE)).ok()?;
        serde_json::from_str::<serde_json::Value>(&answer).ok()?.get("pid")?.as_u64()
    };
    let listed = crate::mount::mounts().into_iter().map(|mount| Listed {
        process: process(&mount),
        mountpoint: mount.place,
        cipher_directory: mount.source,
        user: mount.user,
    });
    listed.collect()
}

/// There are none.
#[cfg(not(feature = "mount"))]
fn mounts() -> Vec<Listed> {
    Vec::new()
}

/// The canonical path of something that should be a mount.
pub(super) fn canonical(path: &Path) -> Result<PathBuf, CliError> {
    mount_point::canonical(path)
        .map_err(|error| CliError::new(Exit::NotMounted, format_args!("{}: {error}", path.display())))
}

/// A connection to the process behind the mount at `mountpoint`, by whatever name.
#[cfg(feature = "mount")]
pub(super) fn connect(mountpoint: &Path) -> Result<Client, ClientError> {
    let found = crate::mount::mount_at(mountpoint).map_err(ClientError::Io)?.ok_or(ClientError::NotServed)?;
    connect_to(&found)
}

/// A connection to the process behind a mount.
#[cfg(feature = "mount")]
pub(super) fn connect_to(mount: &crate::mount::Found) -> Result<Client, ClientError> {
    let runtime = Environment::of_process().runtime_directory();
    Client::connect(runtime.as_deref(), &mount.device, mount.user)
}

/// There are no mounts.
#[cfg(not(feature = "mount"))]
pub(super) fn connect(_: &Path) -> Result<Client, ClientError> {
    Err(ClientError::NotServed)
}

/// What a failed conversation comes to.
pub(super) fn failure(mountpoint: &Path, error: &ClientError) -> CliError {
    let exit = match error {
        ClientError::NotServed => Exit::NotMounted,
        ClientError::Deadline | ClientError::Broken | ClientError::Io(_) => Exit::Other,
    };
    CliError::new(exit, format_args!("{}: {error}", mountpoint.display()))
}

/// Why a mount could not do what it was asked, if its answer says so.
pub(super) fn error_in(answer: &str) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_str(answer).ok()?;
    answer.get("error")?.as_str().map(str::to_owned)
}
