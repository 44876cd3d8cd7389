//! `kmsfs audit`: reading the trail of key uses that `kmsfs mount --audit-log` writes.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::audit::{self, Event, Record, Report, Use, VerifyError};
use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::pins::Pins;
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::unlock::{self, Expected};
use crate::cli::{passphrase, report};
use crate::daemon::log::Level;
use crate::keys::{KeyLimits, Volume};
use crate::storage::CipherDirectory;

/// Check or show the audit log of a mount
#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    #[command(subcommand)]
    command: AuditCommand,
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    Verify(Box<VerifyArgs>),
    Show(ShowArgs),
}

/// Check that no record was changed, left out, moved or put in
#[derive(Debug, Args)]
struct VerifyArgs {
    /// The files of one log, in any order
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The volume's cipher directory: its key authenticates the records
    #[arg(long, value_name = "CIPHERDIR", required_unless_present = "hashes_only")]
    volume: Option<PathBuf>,
    /// Without the volume's key: whoever can write the files could have made all of it
    #[arg(long, conflicts_with = "volume")]
    hashes_only: bool,
    /// Fail unless the log has the record with this hash, which `kmsfs status` or an earlier check showed as head
    #[arg(long, value_name = "HASH")]
    head: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Show the records of a log, one line each; what they say is not checked
#[derive(Debug, Args)]
struct ShowArgs {
    /// The files, in the order to be shown
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Only uses that failed
    #[arg(long)]
    failed: bool,
    /// Only what concerns this id: of a data key, a file, or a request
    #[arg(long, value_name = "ID")]
    id: Option<String>,
}

/// Runs one of them.
pub(crate) fn run(args: &AuditArgs) -> Result<(), CliError> {
    match &args.command {
        AuditCommand::Verify(args) => verify(args),
        AuditCommand::Show(args) => show(args),
    }
}

#[derive(Serialize)]
struct Verified {
    #[serde(flatten)]
    report: Report,
    missing_heads: Vec<String>,
}

fn verify(args: &VerifyArgs) -> Result<(), CliError> {
    let volume = args.volume.as_ref().map(|path| open(path, &args.settings)).transpose()?;
    let key = volume.as_ref().map(|volume| volume.audit.as_ref());
    let (report, missing_heads) = audit::verify(&args.files, key, &args.head).map_err(|error| unreadable(&error))?;
    let verified = Verified { report, missing_heads };
    report::print(&verified, args.json)?;
    let Verified { report, missing_heads } = verified;
    let faults = report.faults.len() as u64 + report.more_faults;
    if faults > 0 {
        return Err(CliError::new(Exit::Unauthentic, format_args!("the audit log is not whole: {faults} faults")));
    }
    if let Some(head) = missing_heads.first() {
        let what = format!("the audit log has no record with the hash {head}");
        return Err(
            CliError::new(Exit::Unauthentic, what).hint("it was cut off before it, or a file of it is not given")
        );
    }
    if report.lost > 0 {
        let what = format!("{} uses of keys are in no record: the log says so itself", report.lost);
        return Err(CliError::new(Exit::Amiss, what));
    }
    Ok(())
}

fn open(path: &std::path::Path, args: &SettingsArgs) -> Result<Volume, CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(args, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let directory = CipherDirectory::open(path)?;
    let sealed = unlock::read_config(&directory)?;
    let secret = passphrase::for_volume(&settings, &environment, Some(&sealed.config))?;
    let providers = settings.for_providers(secret.map(passphrase::for_provider));
    let pins = Pins::of(&environment);
    unlock::unlock(directory.path(), &sealed, &Expected::default(), pins.as_ref(), &providers, KeyLimits::default())
}

fn unreadable(error: &VerifyError) -> CliError {
    CliError::io(error.path.display(), &error.error)
}

fn show(args: &ShowArgs) -> Result<(), CliError> {
    let mut told = Ok(());
    for path in &args.files {
        audit::each_record(path, |record| {
            if told.is_ok() && wanted(args, &record) {
                told = report::say(&format!("{}\n", report::printable(&line(&record))));
            }
        })
        .map_err(|error| unreadable(&error))?;
    }
    told
}

fn wanted(args: &ShowArgs, record: &Record) -> bool {
    let Event::Use(key_use) = &record.event else { return !args.failed && args.id.is_none() };
    let ids = [&key_use.data_key, &key_use.file, &key_use.request_id];
    let named = |id: &String| ids.iter().any(|known| known.as_ref() == Some(id));
    (!args.failed || key_use.result != "ok") && args.id.as_ref().is_none_or(named)
}

fn line(record: &Record) -> String {
    let what = match &record.event {
        Event::Begin { volume, version, pid, .. } => {
            format!("mount of {volume} begins: kmsfs {version}, process {pid}")
        }
        Event::Use(key_use) => use_line(key_use),
        Event::Lost { count, why } => format!("{count} uses are in no record: {why}"),
        Event::Resumed { .. } => "the log goes on after a write that failed".to_owned(),
        Event::End {} => "mount ends".to_owned(),
    };
    format!("{} {:>7} {what}", record.time, record.seq)
}

fn use_line(key_use: &Use) -> String {
    let mut line = format!("{} {} {} {}us", key_use.operation, key_use.result, key_use.key, key_use.micros);
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            line.push_str(&format!(" {name}={value}"));
        }
    };
    put("data-key", Some(key_use.data_key.clone().unwrap_or_else(|| "volume".to_owned())));
    put("file", key_use.file.clone());
    put("uid", key_use.uid.map(|uid| uid.to_string()));
    put("pid", key_use.pid.map(|pid| pid.to_string()));
    put("reason", key_use.reason.clone());
    put("request", key_use.request_id.clone());
    put("error", key_use.error.clone());
    line
}
