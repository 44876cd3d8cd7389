//! `kmsfs recipients`: the wrapping keys each of which opens a volume by itself.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::key_spec::KeySpec;
use crate::cli::pins::Pins;
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::{report, unlock};
use crate::daemon::log::Level;
use crate::format::config::WrappingKey;
use crate::keys::{KeyLimits, volume};
use crate::storage::CipherDirectory;

use super::header_files::HeaderFiles;
use super::key_change::{KeyChange, name_of};
use super::key_coverage::{self, Coverage};

/// Show, add or remove the wrapping keys each of which opens the volume by itself
#[derive(Debug, Args)]
pub(crate) struct RecipientsArgs {
    #[command(subcommand)]
    command: RecipientsCommand,
}

#[derive(Debug, Subcommand)]
enum RecipientsCommand {
    Add(Box<ChangeArgs>),
    Remove(Box<ChangeArgs>),
    List(ListArgs),
}

/// Which key of which volume. The volume must not be mounted.
///
/// A new recipient wraps the data keys of new files from the next mount on; `kmsfs rewrap CIPHERDIR` brings old files along.
/// A key that some file needs is not removed: `kmsfs rewrap CIPHERDIR` first.
#[derive(Debug, Args)]
pub(crate) struct ChangeArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// To add: local:PATH (a keyring, made if missing), aws-kms:KEY, vault:KEY, pkcs11:URI or
    /// age:RECIPIENT; to remove: the same, or as `kmsfs recipients list` shows it
    #[arg(value_name = "PROVIDER:ID")]
    key: KeySpec,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Show a volume's recipients, and how many files have a record of each
///
/// Asks nobody, and authenticates neither the config nor headers. In a large volume it looks at some files only, and says so.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct KeyReport {
    key: String,
    /// It opens the volume, and new files get a record of it; if not, it only opens what it wrapped before.
    recipient: bool,
    /// Where a local key was when it came onto the list.
    keyring: Option<String>,
    /// Counts the files that were looked at; none if one cannot be read.
    files_with: Option<u64>,
    files_without: Option<u64>,
    /// Whether those are all.
    all_files_counted: bool,
}

/// Runs one of them.
pub(crate) fn run(args: &RecipientsArgs) -> Result<(), CliError> {
    match &args.command {
        RecipientsCommand::Add(args) => add(args),
        RecipientsCommand::Remove(args) => remove(args),
        RecipientsCommand::List(args) => list(args),
    }
}

fn begin(args: &ChangeArgs) -> Result<KeyChange, CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    KeyChange::begin(&args.cipher_directory, &settings, &environment, Pins::of(&environment).as_ref())
}

/// Adds it. Files that are there get it from `kmsfs rewrap` only.
fn add(args: &ChangeArgs) -> Result<(), CliError> {
    let mut change = begin(args)?;
    let key = change.add(&args.key)?;
    let coverage = Coverage::look(&change.directory, Some(&change.volume(KeyLimits::default()).ring));
    let advice = match coverage {
        Ok(coverage) => {
            let lack = key_coverage::lack(&coverage, &key, change.directory.path());
            lack.map(|(what, how)| format!("{what}: {how}"))
        }
        Err(error) => Some(format!("the files that lack the key could not be counted: {error}")),
    };
    if let Some(advice) = advice {
        report::tell(&advice);
    }
    Ok(())
}

fn list(args: &ListArgs) -> Result<(), CliError> {
    let directory = CipherDirectory::open(&args.cipher_directory)?;
    let config = unlock::read_config(&directory)?.config;
    let coverage = Coverage::look(&directory, None);
    let found = coverage.as_ref().ok();
    let keys = config.wrapping_keys.iter().map(|key| KeyReport {
        key: name_of(key),
        recipient: volume::wraps_new(&config, key),
        keyring: key.location.clone(),
        files_with: found.map(|found| found.with(key)),
        files_without: found.map(|found| found.without(key)),
        all_files_counted: found.is_some_and(|found| found.whole),
    });
    report::print(&keys.collect::<Vec<_>>(), args.json)?;
    match coverage {
        Err(error) => report::tell(&format!("the files were not counted: {error}")),
        Ok(found) if !found.whole => {
            let all = format!("`kmsfs keys list {} --files` counts all", directory.path().display());
            report::tell(&format!("there are more files than the {} that were looked at: {all}", found.files));
        }
        Ok(_) => {}
    }
    Ok(())
}

/// Removes a key that nothing needs any more.
fn remove(args: &ChangeArgs) -> Result<(), CliError> {
    let mut change = begin(args)?;
    let key = change.listed(&args.key)?;
    let (keys, name) = (&change.config().wrapping_keys, name_of(&key));
    if !keys.iter().any(|other| name_of(other) != name && volume::wraps_new(change.config(), other)) {
        return Err(CliError::usage("the last recipient cannot be removed: nothing would open the volume"));
    }
    let path = change.directory.path().display();
    let (whole, needed) = change.walk_all(|| count_needing(&change, &key));
    let needed = needed?;
    if !whole {
        return Err(CliError::new(Exit::Other, "files were moved meanwhile, so that one may have been missed")
            .hint("run the command again when no program moves files in the mount"));
    }
    if needed > 0 {
        let what = format!("{name} alone opens {needed} of the files and provisioned keys");
        return Err(CliError::new(Exit::Other, what)
            .hint(format_args!("`kmsfs rewrap {path}` gives them the others' records first")));
    }
    change.retire(&key, false)
}

/// How many files and provisioned keys have no record of another key on the list. What does not authenticate does not count:
/// no key opens it.
pub(super) fn count_needing(change: &KeyChange, key: &WrappingKey) -> Result<u64, CliError> {
    let volume = change.volume(KeyLimits::default());
    let others = change.wanted(Some(key));
    let opens = |record: &crate::format::header::Record| {
        others.iter().any(|key| record.provider == key.kind.tag() && record.key_id == key.key.as_bytes())
    };
    let (mut needed, mut unread) = (0, None);
    HeaderFiles::of(&change.directory)?.walk("", |path, page| match page {
        Ok(page) => {
            let header = page.and_then(|page| volume.ring.authenticate(&page).ok().flatten());
            needed += u64::from(header.is_some_and(|header| !header.header().records.iter().any(&opens)));
        }
        Err(error) => unread = Some(CliError::io(path, &error)),
    });
    if let Some(error) = unread {
        return Err(error);
    }
    let failed = |error: std::io::Error| CliError::io(".kmsfs/keys", &error);
    let stock = change.directory.key_stock().map_err(failed)?;
    for name in stock.names().map_err(failed)? {
        let record = stock.read(&name).and_then(|bytes| volume.ring.record_of_provisioned(&name, &bytes));
        needed += u64::from(record.is_some_and(|record| !opens(&record)));
    }
    Ok(needed)
}
