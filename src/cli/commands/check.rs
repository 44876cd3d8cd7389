//! `kmsfs check`: whether what lies in a cipher directory is whole; repairing, and salvaging what still opens.
//!
//! Invariants: without --repair nothing in the cipher directory is changed and no lock is taken; the directory of --salvage
//! is new or empty, and outside of every volume that is checked.

use std::fs::{self, DirBuilder};
use std::io;
use std::num::NonZeroU32;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use crate::check::{self, CheckError, Checker, Finding, Target, TargetError};
use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::mount_point;
use crate::cli::pins::Pins;
use crate::cli::progress::{self, Step};
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::unlock;
use crate::cli::{passphrase, report};
use crate::daemon::log::Level;
use crate::format::geometry::PAGE_SIZE;
use crate::keys::KeyLimits;
use crate::keys::providers::ProviderSettings;
use crate::storage::CipherDirectory;

use super::check_config::{Opening, Subject};
use super::check_paths;
use super::check_report::CheckReport;
use super::tree_totals::Totals;

/// Calls of a remote provider at the same time, unless told otherwise.
const CALLS: usize = 64;
/// In the directory of --salvage.
const SALVAGE_REPORT: &str = "report.json";

/// Check that everything in a volume is whole and authentic
///
/// Reads every file, page, name, link and attribute, beside a mount or without one, and changes nothing. What a mount may be
/// writing at the moment is looked at three times before it is believed. Under AWS KMS each data key costs one call. Exit
/// codes: 0 nothing is wrong (or all of it was repaired); 13 something does not authenticate or is missing; 14 something
/// cannot be read; 6, 7 or 8 keys cannot be had; 4 the config does not hold; 15 something is not as it should be, and nothing
/// is lost by it.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Cipher directories, mount points, or files and directories in one of them
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
    /// Check only what needs no key: the config, headers, sizes, directory ids, long names, strangers
    #[arg(long, conflicts_with_all = ["repair", "salvage"])]
    structure: bool,
    /// Finish interrupted steps, restore header slots from their copies, remove what means nothing. Destroys nothing; the
    /// volume must not be mounted
    #[arg(long)]
    repair: bool,
    /// Copy what still opens of damaged files to DIR, which must be new or empty, with a report of what does not
    #[arg(long, value_name = "DIR")]
    salvage: Option<PathBuf>,
    /// Print JSON, one line for each volume
    #[arg(long)]
    json: bool,
    /// Make so many calls of the key's provider a second at most
    #[arg(long, value_name = "CALLS")]
    kms_rate: Option<NonZeroU32>,
    /// Look at so many files at the same time [default: 64 with a remote provider, else one for each CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: Option<u8>,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Checks each volume; the first failure decides the exit code.
pub(crate) fn run(args: &CheckArgs) -> Result<(), CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let (volumes, failures) = check_paths::volumes(&args.paths);
    if args.salvage.is_some() && volumes.len() > 1 {
        return Err(CliError::usage("--salvage takes one volume at a time"));
    }
    let salvage = args.salvage.as_deref().map(|into| prepare(into, &volumes)).transpose()?;
    // One passphrase is for all of them.
    let first = volumes.first().and_then(|(path, _)| CipherDirectory::open(path).ok());
    let first = first.and_then(|directory| unlock::read_config(&directory).ok());
    let config = first.as_ref().map(|sealed| &sealed.config);
    let secret = match args.structure {
        false => passphrase::for_volume(&settings, &environment, config)?,
        true => None,
    };
    let providers = settings.for_providers(secret.map(passphrase::for_provider));
    let checked = volumes
        .iter()
        .filter_map(|(path, targets)| check(args, path, targets, salvage.as_deref(), &providers, &environment).err());
    // A path that names no volume keeps no other from being checked.
    let mut failures = failures.into_iter().chain(checked);
    let first = failures.next();
    failures.for_each(|error| error.print());
    first.map_or(Ok(()), Err)
}

/// The directory for what is salvaged: new or empty, and apart from the volumes.
fn prepare(into: &Path, volumes: &[(PathBuf, Vec<Target>)]) -> Result<PathBuf, CliError> {
    let refuse = |why: &dyn std::fmt::Display| CliError::usage(format_args!("--salvage {}: {why}", into.display()));
    let path = mount_point::canonical_or_new(into).map_err(|error| refuse(&error))?;
    if volumes.iter().any(|(volume, _)| fs::canonicalize(volume).is_ok_and(|volume| path.starts_with(volume))) {
        return Err(refuse(&"it lies inside the cipher directory"));
    }
    match DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let mut entries = fs::read_dir(&path).map_err(|error| refuse(&error))?;
            if entries.next().is_some() { Err(refuse(&"it is not empty")) } else { Ok(path) }
        }
        Err(error) => Err(refuse(&error)),
        Ok(()) => Ok(path),
    }
}

fn check(
    args: &CheckArgs,
    path: &Path,
    targets: &[Target],
    salvage: Option<&Path>,
    providers: &ProviderSettings,
    environment: &Environment,
) -> Result<(), CliError> {
    let started = Instant::now();
    let pins = Pins::of(environment);
    let opening = Opening {
        providers: (!args.structure).then_some(providers),
        pins: pins.as_ref(),
        limits: KeyLimits { calls_per_second: args.kms_rate, ..KeyLimits::default() },
        repair: args.repair,
    };
    let mut report = CheckReport {
        cipher_directory: path.display().to_string(),
        structure_only: args.structure,
        ..CheckReport::default()
    };
    let subject = opening.open(path).inspect_err(|error| {
        if error.code() == Exit::Config as u8 && args.json {
            report.findings.push(Finding::config(error.to_string(), false));
            // The error itself is told anyway.
            let _ = report.print(true);
        }
    })?;
    let remote = subject.volume.as_ref().is_some_and(|volume| volume.ring.is_remote());
    let settings =
        check::Settings { parallel: parallel(args.parallel, remote), alone: args.repair, salvage: salvage.is_some() };
    let checker = Checker::new(&subject.directory, &subject.sealed.config, subject.volume.as_ref(), settings);
    let checker = checker.map_err(|error| match error {
        CheckError::Config(error) => error.into(),
        CheckError::Io(error) => CliError::io(path.display(), &error),
    })?;
    fill(&mut report, &checker, &subject, targets, args.repair, salvage)?;
    report.seconds = started.elapsed().as_secs_f64();
    report.print(args.json)?;
    subject.permit().check()?;
    report.verdict(checker.key_failure()).map_or(Ok(()), Err)
}

/// Checks, repairs and salvages as asked.
fn fill(
    report: &mut CheckReport,
    checker: &Checker<'_>,
    subject: &Subject,
    targets: &[Target],
    repair: bool,
    salvage: Option<&Path>,
) -> Result<(), CliError> {
    let is_whole = targets.iter().any(Target::is_whole);
    let totals = if is_whole { Totals::below(subject.directory.path().to_owned()) } else { Totals::default() };
    let step = || {
        let at = checker.progress();
        let files =
            totals.files().map_or_else(|| report::counted(at.files, "file"), |all| report::part(at.files, all, "file"));
        let size = progress::size_text(at.pages * PAGE_SIZE);
        let text = format!("{files}, {size}, findings: {}", at.findings);
        let of = totals.step(at.files, at.pages * PAGE_SIZE).filter(|_| !report.structure_only);
        Step { text, of }
    };
    let found = progress::show_while(step, || checker.run(targets));
    report.findings = found.map_err(|error| match error {
        TargetError::NeedsKeys => CliError::usage(error),
        TargetError::NoId => CliError::new(Exit::Unauthentic, error),
        TargetError::Io(path, error) => CliError::io(path, &error),
    })?;
    let io_error = |error: io::Error| CliError::io(&report.cipher_directory, &error);
    if repair {
        let permit = subject.permit();
        report.settled = checker.mend(&mut report.findings, &|| Ok(permit.check()?)).map_err(io_error)?;
    }
    report.findings.extend(subject.mended.iter().cloned());
    if let Some(into) = salvage {
        let failed = |error: io::Error| CliError::io(into.display(), &error);
        report.salvaged = checker.salvage(&report.findings, into).map_err(failed)?;
        let text = serde_json::to_string_pretty(&report.salvaged).map_err(|error| CliError::new(Exit::Other, error))?;
        fs::write(into.join(SALVAGE_REPORT), text).map_err(failed)?;
    }
    report.volume_id = Some(subject.sealed.config.volume_id.clone());
    report.clean = report.findings.iter().all(|finding| finding.repaired);
    report.count(checker.progress());
    Ok(())
}

/// Threads: as many as wanted, else as many as are of use.
pub(super) fn parallel(wanted: Option<u8>, remote: bool) -> usize {
    let cpus = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    wanted.map_or_else(|| if remote { CALLS } else { cpus() }, usize::from)
}
