//! `kmsfs status`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

#[cfg(feature = "mount")]
use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::settings::SettingsArgs;
use crate::cli::watched::Status;
use crate::cli::{mount_point, report};
use crate::daemon::control::{Ask, Client, ClientError};

use super::{check_paths, keys_list, keys_usage};

/// How long a mount may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// And one of a list of mounts.
#[cfg(feature = "mount")]
const QUICK: Duration = Duration::from_secs(2);

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
    let Some(mountpoint) = &args.mountpoint else {
        let mounts = mounts();
        if mounts.is_empty() && !args.json {
            report::tell("there is no kmsfs mount here");
        }
        return report::print(&mounts, args.json);
    };
    let mountpoint = canonical(mountpoint)?;
    if args.keys {
        let (volumes, failures) = check_paths::volumes(std::slice::from_ref(&mountpoint));
        failures.into_iter().next().map_or(Ok(()), Err)?;
        return volumes.iter().try_for_each(|(cipher_directory, _)| {
            let (due_after, settings) = (keys_usage::DUE_AFTER_DAYS, SettingsArgs::default());
            keys_list::list_volume(cipher_directory, true, due_after, args.json, &settings)
        });
    }
    let status = connect(&mountpoint)
        .and_then(|client| client.tell(Ask::Status, DEADLINE))
        .map_err(|e| failure(&mountpoint, &e))?;
    report::print_json(&with_kernels_word(&mountpoint, status), args.json)
}

/// A mount that was made read-only by a remount is that, whatever its process thinks.
fn with_kernels_word(mountpoint: &Path, status: String) -> String {
    if !is_read_only(mountpoint) {
        return status;
    }
    // A process of another version tells other things.
    let Ok(mut read) = serde_json::from_str::<Status>(&status) else { return status };
    read.stats.read_only = true;
    serde_json::to_string(&read).unwrap_or(status)
}

#[cfg(feature = "mount")]
fn is_read_only(mountpoint: &Path) -> bool {
    let found = crate::mount::mount_at(mountpoint).ok().flatten();
    found.is_some_and(|mount| mount.options.split(',').any(|option| option == "ro"))
}

#[cfg(not(feature = "mount"))]
fn is_read_only(_: &Path) -> bool {
    false
}

/// A mount in the list of all.
#[derive(Serialize)]
struct Listed {
    mountpoint: PathBuf,
    cipher_directory: PathBuf,
    /// Who mounted it.
    user: u32,
    /// The process behind it, if it answers this user.
    process: Option<i64>,
    /// Whether somebody serves it, as far as this user can tell.
    state: &'static str,
}

/// All mounts that this process sees.
#[cfg(feature = "mount")]
fn mounts() -> Vec<Listed> {
    let state = |mount: &crate::mount::Found, process: Option<i64>| match process {
        Some(_) => "served",
        None if is_of_another(mount) => "of another user",
        None if mount_point::is_dead_mount(&mount.place) => "dead",
        None => "does not answer",
    };
    let listed = crate::mount::mounts().into_iter().map(|mount| {
        let process = process_of(&mount);
        let state = state(&mount, process);
        Listed { process, state, mountpoint: mount.place, cipher_directory: mount.source, user: mount.user }
    });
    listed.collect()
}

/// The process behind a mount, if it answers this user.
#[cfg(feature = "mount")]
pub(crate) fn process_of(mount: &crate::mount::Found) -> Option<i64> {
    let answer = connect_to(mount).and_then(|client| client.tell(Ask::Status, QUICK)).ok()?;
    serde_json::from_str::<serde_json::Value>(&answer).ok()?.get("pid")?.as_i64()
}

/// Whether only somebody else may ask the process behind a mount.
#[cfg(feature = "mount")]
pub(super) fn is_of_another(mount: &crate::mount::Found) -> bool {
    let user = rustix::process::geteuid();
    !user.is_root() && user.as_raw() != mount.user
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
    match error {
        ClientError::NotServed => not_served(mountpoint),
        // Sockets of other users are closed to this one.
        ClientError::Io(error) if error.kind() == io::ErrorKind::PermissionDenied => not_served(mountpoint),
        ClientError::Deadline | ClientError::Broken | ClientError::Io(_) => {
            CliError::new(Exit::Other, format_args!("{}: {error}", mountpoint.display()))
        }
    }
}

/// Why no process answers for what is at `mountpoint`, and what to do.
#[cfg(feature = "mount")]
pub(super) fn not_served(mountpoint: &Path) -> CliError {
    let place = mountpoint.display();
    let not_mounted = |what: std::fmt::Arguments<'_>| CliError::new(Exit::NotMounted, what);
    match crate::mount::mount_at(mountpoint) {
        Err(error) => not_mounted(format_args!("{place}: {error}")),
        Ok(None) => match crate::mount::kind_at(mountpoint) {
            Some(kind) => not_mounted(format_args!("{place} is no kmsfs mount, but one of {kind}")),
            None => not_mounted(format_args!("{place} is not mounted")),
        },
        Ok(Some(mount)) if is_of_another(&mount) => {
            CliError::new(Exit::Other, format_args!("{place} is a mount of user {}", mount.user))
                .hint("that user or root may ask for it")
        }
        Ok(Some(mount)) if mount_point::is_dead_mount(mountpoint) => {
            let source = mount.source.display();
            not_mounted(format_args!("{place} is a dead mount: the process behind it has ended")).hint(format_args!(
                "`kmsfs mount {source} {place}` mounts it again, `kmsfs umount {place}` takes it away"
            ))
        }
        Ok(Some(_)) => not_mounted(format_args!("{place}: no process answers for this mount")),
    }
}

#[cfg(not(feature = "mount"))]
fn not_served(mountpoint: &Path) -> CliError {
    CliError::new(Exit::NotMounted, format_args!("{}: {}", mountpoint.display(), ClientError::NotServed))
}

/// Why a mount could not do what it was asked, if its answer says so.
pub(super) fn error_in(answer: &str) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_str(answer).ok()?;
    answer.get("error")?.as_str().map(str::to_owned)
}
