//! What watches a mount: the audit log and the page of metrics, from their flags to their end.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use crate::audit::{AuditTrail, BeginError, FileError, LogFile};
use crate::cli::error::{CliError, Exit};
use crate::daemon::http::{Address, Bound};
use crate::keys::{Trail, Volume};

/// The smallest size in MiB at which an audit log is set aside, and so the unit.
const MIB: u64 = 1 << 20;

/// Who may watch.
#[derive(Debug, Args)]
#[command(next_help_heading = "Observability")]
pub(super) struct ObserveArgs {
    /// Record each use of a wrapping key in this file: who, when, which file, what came of it (`kmsfs audit` reads it)
    #[arg(long, value_name = "FILE")]
    audit_log: Option<PathBuf>,
    /// Set the audit log aside as FILE.NUMBER when it has so many MiB, and go on in a new one
    #[arg(long, value_name = "MIB", requires = "audit_log", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    audit_log_size: Option<u64>,
    /// Use a key only if that is recorded: without a disk for the audit log, files do not open
    #[arg(long, requires = "audit_log")]
    audit_required: bool,
    /// Answer GET /metrics with OpenMetrics text: unix:PATH, 127.0.0.1:PORT or [::1]:PORT
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<Address>,
}

/// An audit log, and the file that it will go on in.
struct Audit {
    trail: Arc<AuditTrail>,
    path: PathBuf,
    /// Bytes at which it is set aside.
    most: Option<u64>,
    file: Option<LogFile>,
}

/// What watches one mount.
pub(super) struct Observers {
    audit: Option<Audit>,
    address: Option<Address>,
    page: Option<Bound>,
    /// Where metrics can be read.
    pub(super) metrics: Option<String>,
}

impl ObserveArgs {
    /// Whether a key may be withheld by this host, and not only by its provider.
    pub(super) fn may_withhold_keys(&self) -> bool {
        self.audit_required
    }

    /// Those that are asked for. Nothing is touched.
    pub(super) fn observers(&self) -> Result<Observers, CliError> {
        let audit = self.audit_log.as_ref().map(|path| -> Result<_, CliError> {
            let path = std::path::absolute(path).map_err(|error| CliError::io(path.display(), &error))?;
            let trail = Arc::new(AuditTrail::new(self.audit_required));
            Ok(Audit { trail, path, most: self.audit_log_size.map(|size| size * MIB), file: None })
        });
        Ok(Observers { audit: audit.transpose()?, address: self.metrics.clone(), page: None, metrics: None })
    }
}

impl Observers {
    /// Takes file and address, before a volume's key is used. Neither may be in one of `volume_places`: the mount would wait
    /// for itself.
    pub(super) fn take_places(&mut self, volume_places: &[&Path]) -> Result<(), CliError> {
        if let Some(audit) = &self.audit {
            check_outside("--audit-log", &audit.path, volume_places)?;
        }
        if let Some(Address::Unix(path)) = &self.address {
            check_outside("--metrics", path, volume_places)?;
        }
        if let Some(audit) = &mut self.audit {
            audit.file = Some(LogFile::open(&audit.path, audit.most).map_err(unusable)?);
        }
        if let Some(address) = &self.address {
            let bound =
                Bound::bind(address).map_err(|error| CliError::io(format_args!("--metrics {address}"), &error))?;
            self.metrics = Some(bound.address.to_string());
            self.page = Some(bound);
        }
        Ok(())
    }

    /// Directories in which a file is set aside or a socket removed later.
    pub(super) fn directories(&self) -> Vec<PathBuf> {
        let socket = match &self.address {
            Some(Address::Unix(path)) => Some(path),
            _ => None,
        };
        let files = self.audit.iter().map(|audit| &audit.path).chain(socket);
        files.filter_map(|path| std::path::absolute(path).ok()?.parent().map(Path::to_owned)).collect()
    }

    /// Where providers record their calls.
    pub(super) fn trail(&self) -> Option<Trail> {
        self.audit.as_ref().map(|audit| Trail(audit.trail.uses()))
    }

    /// The audit log.
    pub(super) fn audit(&self) -> Option<Arc<AuditTrail>> {
        self.audit.as_ref().map(|audit| Arc::clone(&audit.trail))
    }

    /// Begins the audit log of this volume: what was done to unlock it is recorded.
    pub(super) fn begin_audit(&mut self, volume: &Volume) -> Result<(), CliError> {
        let Some(Audit { trail, file, .. }) = &mut self.audit else { return Ok(()) };
        let Some(file) = file.take() else { return Ok(()) };
        trail.begin(file, Arc::clone(&volume.audit), &volume.id_text()).map_err(|error| match &error {
            BeginError::OtherVolume(_) => CliError::new(Exit::Unauthentic, error)
                .hint("`kmsfs audit verify` says what is wrong with it; move it away to begin a new one"),
            BeginError::Io { .. } => CliError::new(Exit::Io, error),
        })
    }

    /// The place of the page of metrics.
    pub(super) fn take_page(&mut self) -> Option<Bound> {
        self.page.take()
    }

    /// Writes what is left of the audit log.
    pub(super) fn end(&self) {
        if let Some(audit) = &self.audit {
            audit.trail.end();
        }
    }
}

impl Drop for Observers {
    /// A mount that did not begin leaves no log behind that was made for it.
    fn drop(&mut self) {
        self.audit.iter_mut().filter_map(|audit| audit.file.take()).for_each(LogFile::discard);
    }
}

fn check_outside(flag: &str, path: &Path, volume_places: &[&Path]) -> Result<(), CliError> {
    let failed = |error| CliError::io(format_args!("{flag} {}", path.display()), &error);
    let path = std::path::absolute(path).map_err(failed)?;
    let directory = path.parent().unwrap_or(&path).canonicalize().map_err(failed)?;
    if volume_places.iter().any(|place| directory.starts_with(place)) {
        let what = format!("{flag} {}: it is in the volume or on its mount", path.display());
        return Err(CliError::usage(what).hint("give a place outside of both"));
    }
    Ok(())
}

fn unusable(error: FileError) -> CliError {
    match &error {
        FileError::Io { .. } => CliError::new(Exit::Io, error),
        FileError::InUse(_) => CliError::new(Exit::Locked, error),
        FileError::NotAFile(_) => CliError::usage(error),
        FileError::NotALog(_) => CliError::new(Exit::Unauthentic, error).hint("name another file, or move it away"),
    }
}
