//! `kmsfs mount -o remount,...`: what mount(8) asks for when the options of a mount are to change.

use std::path::Path;
use std::time::Duration;

use crate::cli::error::CliError;
use crate::cli::mount_options::MountFlags;
use crate::daemon::control::Ask;
use crate::mount;

use super::status;

/// How long the mount's process may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// Changes the options of the mount at `mountpoint`; those that are not given stay.
pub(super) fn run(mountpoint: &Path, given: &[String]) -> Result<(), CliError> {
    let mountpoint = status::canonical(mountpoint)?;
    let current = mount::options_at(&mountpoint).ok_or_else(|| status::not_served(&mountpoint))?;
    let flags = MountFlags::parse(&[&[current], given].concat())?;
    if !flags.read_only && serves_read_only(&mountpoint)? {
        let what = format!("{} was mounted read-only and cannot become writable", mountpoint.display());
        return Err(CliError::usage(what).hint("unmount it, and mount it again without `ro`"));
    }
    let options = mount::Options {
        mountpoint,
        read_only: flags.read_only,
        suid: flags.suid,
        dev: flags.dev,
        exec: !flags.noexec,
        noatime: flags.noatime,
        vfs: flags.vfs.bits(),
        ..mount::Options::default()
    };
    Ok(mount::remount(&options)?)
}

fn serves_read_only(mountpoint: &Path) -> Result<bool, CliError> {
    let answer = status::connect(mountpoint).and_then(|client| client.tell(Ask::Status, ANSWER));
    let answer = answer.map_err(|error| status::failure(mountpoint, &error))?;
    let status: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
    Ok(status["read_only"].as_bool().unwrap_or(false))
}
