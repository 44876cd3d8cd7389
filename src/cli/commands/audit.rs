//! `kmsfs audit`: reading the trail of key uses that `kmsfs mount --audit-log` writes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

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
use crate::format::hex;
use crate::keys::{KeyLimits, Volume};
use crate::storage::CipherDirectory;

use super::header_files::HeaderFiles;

/// Check or show the audit log of a mount
#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    #[command(subcommand)]
    command: AuditCommand,
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    Verify(Box<VerifyArgs>),
    Show(Box<ShowArgs>),
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
    /// Show a plain path of each file of this volume that is still there: reads all its headers, and needs its key
    #[arg(long, value_name = "CIPHERDIR")]
    names: Option<PathBuf>,
    #[command(flatten)]
    settings: SettingsArgs,
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
    /// No record was changed, left out, moved or put in, up to the last one.
    whole: bool,
    /// The last record is not the end of a mount, or one that `--head` names is missing.
    may_be_cut_off: bool,
    #[serde(flatten)]
    report: Report,
    missing_heads: Vec<String>,
}

impl Verified {
    fn of(report: Report, missing_heads: Vec<String>, heads: &[String]) -> Self {
        let whole = report.records > 0 && report.faults.is_empty();
        let has_end = heads.contains(&report.head) || report.ended && report.torn_end == 0;
        Self { whole, may_be_cut_off: !has_end || !missing_heads.is_empty(), report, missing_heads }
    }

    fn verdict(&self, volume: Option<&Volume>) -> Result<(), CliError> {
        let Self { report, missing_heads, .. } = self;
        let not_whole = |what: String| CliError::new(Exit::Unauthentic, what);
        if report.records == 0 && report.unauthentic == 0 {
            return Err(not_whole("no audit log: there is no record in it".to_owned())
                .hint("name the file that `kmsfs mount --audit-log` writes, and those that it was rotated to"));
        }
        let named = report.volume.as_ref().zip(volume.map(|volume| &volume.config.volume_id));
        if let Some((named, wanted)) = named.filter(|(named, wanted)| report.records == 0 && named != wanted) {
            return Err(not_whole(format!("the log of another volume, {named}: that of --volume is {wanted}")));
        }
        let faults = report.faults.len() as u64 + report.more_faults;
        if faults > 0 {
            return Err(not_whole(format!("the audit log is not whole: {}", report::counted(faults, "fault"))));
        }
        if let Some(head) = missing_heads.first() {
            let what = format!("the audit log is cut off: it has no record with the hash {head}");
            return Err(not_whole(what).hint("it was cut off before it, or a file of it is not given"));
        }
        if report.lost > 0 {
            let what = format!("{} in no record: the log says so itself", report::counted(report.lost, "key use"));
            return Err(CliError::new(Exit::Amiss, what));
        }
        Ok(())
    }

    /// In words, of a log without faults.
    fn conclusion(&self) -> String {
        let begin = match self.report.first {
            1 => "",
            _ => " Older records are not in these files.",
        };
        let end = match (self.may_be_cut_off, self.report.ended) {
            (false, false) => "The log is whole up to the record that --head names.",
            (false, true) => {
                "The log is whole: its last record is the end of a mount. Only --head shows whether later mounts are missing."
            }
            (true, _) => {
                "The log is whole up to its last record, and may be cut off at its end: its last mount still runs, was killed, \
                 or its last records are missing. --head tells which."
            }
        };
        let unproven = if self.report.authenticated { "" } else { " Without --volume, its writer could be anybody." };
        format!("{end}{begin}{unproven}")
    }
}

fn verify(args: &VerifyArgs) -> Result<(), CliError> {
    let volume = args.volume.as_ref().map(|path| open(path, &args.settings)).transpose()?;
    let key = volume.as_ref().map(|volume| volume.audit.as_ref());
    let (report, missing_heads) = audit::verify(&args.files, key, &args.head).map_err(|error| unreadable(&error))?;
    let verified = Verified::of(report, missing_heads, &args.head);
    report::print(&verified, args.json)?;
    verified.verdict(volume.as_ref())?;
    if args.json { Ok(()) } else { report::say(&format!("\n{}\n", verified.conclusion())) }
}

fn open(path: &Path, args: &SettingsArgs) -> Result<Volume, CliError> {
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
    let names = args.names.as_ref().map(|path| names(path, &args.settings)).transpose()?.unwrap_or_default();
    let mut told = Ok(());
    for path in &args.files {
        let mut records = 0_u64;
        let others = audit::each_record(path, |record| {
            records += 1;
            if told.is_ok() && wanted(args, &record) {
                told = report::say(&format!("{}\n", report::printable(&line(&record, &names))));
            }
        })
        .map_err(|error| unreadable(&error))?;
        if others > 0 && records == 0 {
            let what = format_args!("{}: no audit log: there is no record in it", path.display());
            return Err(CliError::new(Exit::Unauthentic, what));
        }
        if others > 0 {
            CliError::warn(format_args!("{}: lines that are no records: {others}", path.display()));
        }
    }
    told
}

/// Plain paths by file ids, in hexadecimal.
type Names = HashMap<String, String>;

/// A plain path of each file of the volume. What cannot be read has none.
fn names(path: &Path, args: &SettingsArgs) -> Result<Names, CliError> {
    let volume = open(path, args)?;
    let files = HeaderFiles::of(&CipherDirectory::open(path)?)?;
    let (plain, mut names) = (files.names(&volume), Names::new());
    files.walk("", |path, page| {
        let header = page.ok().flatten().and_then(|page| volume.ring.authenticate(&page).ok().flatten());
        if let Some((header, name)) = header.zip(plain.plain_path(path)) {
            names.insert(hex::encode(&header.header().file_id), String::from_utf8_lossy(&name).into_owned());
        }
    });
    Ok(names)
}

fn wanted(args: &ShowArgs, record: &Record) -> bool {
    let Event::Use(key_use) = &record.event else { return !args.failed && args.id.is_none() };
    let ids = [&key_use.data_key, &key_use.file, &key_use.request_id];
    let named = |id: &String| ids.iter().any(|known| known.as_ref() == Some(id));
    (!args.failed || key_use.result != "ok") && args.id.as_ref().is_none_or(named)
}

fn line(record: &Record, names: &Names) -> String {
    let what = match &record.event {
        Event::Begin { volume, version, pid, .. } => {
            format!("mount of {volume} begins: kmsfs {version}, process {pid}")
        }
        Event::Use(key_use) => use_line(key_use, names),
        Event::Lost { count, why } => format!("{} in no record: {why}", report::counted(*count, "key use")),
        Event::Resumed { .. } => "the log goes on after a write that failed".to_owned(),
        Event::End {} => "mount ends".to_owned(),
    };
    format!("{} {:>7} {what}", record.time, record.seq)
}

fn use_line(key_use: &Use, names: &Names) -> String {
    let mut line = format!("{} {} {} {}us", key_use.operation, key_use.result, key_use.key, key_use.micros);
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            line.push_str(&format!(" {name}={value}"));
        }
    };
    put("data-key", Some(key_use.data_key.clone().unwrap_or_else(|| "volume".to_owned())));
    put("file", key_use.file.clone());
    put("path", key_use.file.as_ref().and_then(|file| names.get(file)).map(|path| format!("{path:?}")));
    put("uid", key_use.uid.map(|uid| uid.to_string()));
    put("pid", key_use.pid.map(|pid| pid.to_string()));
    put("reason", key_use.reason.clone());
    put("request", key_use.request_id.clone());
    put("error", key_use.error.clone());
    line
}
