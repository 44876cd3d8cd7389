//! `kmsfs doctor`: whether this host can read and create in a volume, and what to mend if not.
//!
//! Invariants: nothing is changed, on disk or in a KMS; no provider is asked before everything that needs no key has held;
//! what a key opens is dropped at once, and what others wrote (configs, answers) does not steer the terminal.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::key_spec::KeySpec;
use crate::cli::pins::{Pins, Remembered};
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::unlock;
use crate::cli::{passphrase, report};
use crate::daemon::log::Level;
use crate::format::config::SealedConfig;
use crate::storage::CipherDirectory;

use super::doctor_keys::Subject;
use super::policy::Role;
use super::{doctor_host, doctor_keys, policy};

/// Check whether this host can read and create files in a volume, and say what to mend
///
/// Nothing is changed. Under AWS KMS each wrapping key costs one call of DescribeKey, GetKeyRotationStatus and Decrypt,
/// and each further recipient one of Encrypt. The volume costs one more Decrypt, which must be refused, and one
/// GenerateDataKey, whose key is dropped. In a large volume it looks at the headers of some files only, and says so.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// Check only what a read-only mount needs; with --policy, for a host that reads, or creates files with provisioned keys
    /// only (kms:Decrypt alone)
    #[arg(long)]
    read_only: bool,
    /// Print a least-privilege key policy and IAM policy for the volume instead; needs no key and no network
    #[arg(long)]
    policy: bool,
    /// With --policy: for whoever runs `kmsfs keys provision`
    #[arg(long, requires = "policy", conflicts_with = "read_only")]
    provision: bool,
    /// With --policy: for whoever runs `kmsfs rewrap`
    #[arg(long, requires = "policy", conflicts_with_all = ["read_only", "provision"])]
    rewrap: bool,
    /// With --rewrap: for `kmsfs rewrap --to` this key
    #[arg(long, value_name = "PROVIDER:ID", requires = "rewrap")]
    to: Option<KeySpec>,
    /// With --to: the key that it replaces, if the volume has several
    #[arg(long, value_name = "PROVIDER:ID", requires = "to")]
    from: Option<KeySpec>,
    /// Whom the key policy allows
    #[arg(long, value_name = "ARN", requires = "policy")]
    principal: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Grade {
    Ok,
    Warn,
    Fail,
}

/// What a check found.
#[derive(Debug, Serialize)]
pub(super) struct Finding {
    pub(super) check: &'static str,
    pub(super) grade: Grade,
    pub(super) what: String,
    pub(super) mend: Option<String>,
    /// The exit code, if this is the first failure.
    #[serde(skip)]
    code: u8,
}

/// What all checks found, in their order.
#[derive(Debug, Default)]
pub(super) struct Findings(Vec<Finding>);

impl Findings {
    /// Something holds.
    pub(super) fn ok(&mut self, check: &'static str, what: impl ToString) {
        self.add(check, Grade::Ok, 0, what, None);
    }

    /// Something may hurt later, or cannot be known.
    pub(super) fn warn(&mut self, check: &'static str, what: impl ToString, mend: &str) {
        self.add(check, Grade::Warn, 0, what, Some(mend));
    }

    /// Something is wrong that has this exit code.
    pub(super) fn fail(&mut self, check: &'static str, code: u8, what: impl ToString, mend: Option<&str>) {
        self.add(check, Grade::Fail, code, what, mend);
    }

    fn add(&mut self, check: &'static str, grade: Grade, code: u8, what: impl ToString, mend: Option<&str>) {
        let what = report::printable(&what.to_string());
        self.0.push(Finding { check, grade, what, mend: mend.map(report::printable), code });
    }

    /// Adds those of another series of checks.
    pub(super) fn append(&mut self, mut others: Self) {
        self.0.append(&mut others.0);
    }

    /// Makes all failures warnings: something else does what they would have to.
    pub(super) fn soften(&mut self) {
        self.0.iter_mut().filter(|finding| finding.grade == Grade::Fail).for_each(|f| f.grade = Grade::Warn);
    }

    /// The exit code of the first failure.
    pub(super) fn first_failure(&self) -> Option<u8> {
        self.0.iter().find(|finding| finding.grade == Grade::Fail).map(|finding| finding.code)
    }

    fn text(&self) -> String {
        let width = self.0.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
        let mut text = String::new();
        for Finding { check, grade, what, mend, .. } in &self.0 {
            let grade = match grade {
                Grade::Ok => "ok",
                Grade::Warn => "warn",
                Grade::Fail => "FAIL",
            };
            text.push_str(&format!("{grade:4}  {check:width$}  {what}\n"));
            if let Some(mend) = mend {
                text.push_str(&format!("{:4}  {:width$}  -> {mend}\n", "", ""));
            }
        }
        text
    }

    fn verdict(&self) -> Result<(), CliError> {
        let failed: Vec<_> = self.0.iter().filter(|finding| finding.grade == Grade::Fail).collect();
        let Some(first) = failed.first() else { return Ok(()) };
        let count = format!("{} of {} checks failed", failed.len(), self.0.len());
        Err(CliError::with_code(first.code, format_args!("{count}, first {}: {}", first.check, first.what)))
    }
}

#[derive(Serialize)]
struct Report<'a> {
    path: String,
    healthy: bool,
    checks: &'a [Finding],
}

/// Checks, and tells.
pub(crate) fn run(args: &DoctorArgs) -> Result<(), CliError> {
    let environment = Environment::of_process();
    if args.policy {
        let role = match (args.read_only, args.provision, args.rewrap) {
            (true, ..) => Role::Decrypt,
            (_, true, _) => Role::Provision,
            (.., true) => Role::Rewrap,
            _ => Role::Full,
        };
        let request = policy::Request { principal: args.principal.as_deref(), role };
        let (to, from) = (args.to.as_ref(), args.from.as_ref());
        return policy::print(&args.cipher_directory, &request, to, from, &environment);
    }
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let mut findings = Findings::default();
    check_volume(args, &settings, &environment, &mut findings);
    doctor_host::check(&environment, &mut findings);
    let verdict = findings.verdict();
    if args.json {
        let path = args.cipher_directory.display().to_string();
        report::print(&Report { path, healthy: verdict.is_ok(), checks: &findings.0 }, true)?;
    } else {
        report::say(&findings.text())?;
    }
    verdict
}

fn check_volume(args: &DoctorArgs, settings: &Settings, environment: &Environment, findings: &mut Findings) {
    const CHECK: &str = "cipher directory";
    let directory = match CipherDirectory::open(&args.cipher_directory).map_err(CliError::from) {
        Ok(directory) => directory,
        Err(error) => return findings.fail(CHECK, error.code(), &error, error.hint_text()),
    };
    doctor_host::check_access(&directory, args.read_only, findings);
    doctor_host::check_backing(&directory, args.read_only, findings);
    doctor_host::check_lock(&directory, findings);
    let Some(sealed) = check_config(&directory, findings) else { return };
    let Ok(remembered) = check_pin(&directory, &sealed, environment, findings) else { return };
    let secret = match passphrase::for_volume(settings, environment, Some(&sealed.config)) {
        Ok(secret) => secret.map(passphrase::for_provider),
        Err(error) => return findings.fail("passphrase", error.code(), &error, None),
    };
    let stock = directory.key_stock().ok();
    let subject = Subject {
        directory: &directory,
        stock: stock.as_ref(),
        sealed: &sealed,
        remembered: remembered.as_ref(),
        providers: &settings.for_providers(secret),
        read_only: args.read_only,
    };
    doctor_keys::check(&subject, findings);
}

fn check_config(directory: &CipherDirectory, findings: &mut Findings) -> Option<SealedConfig> {
    match unlock::read_config(directory) {
        Ok(sealed) => {
            let config = &sealed.config;
            let what = format!("volume {}, suite {}", config.volume_id, config.suite);
            findings.ok(
                "config",
                format!("{what}, {} per data key", report::counted(config.files_per_data_key.into(), "file")),
            );
            Some(sealed)
        }
        Err(error) => {
            findings.fail("config", error.code(), &error, Some(&unlock::config_hint(directory)));
            None
        }
    }
}

/// The remembered volume, if it is this one or there is none; after anything else no provider must be asked.
fn check_pin(
    directory: &CipherDirectory,
    sealed: &SealedConfig,
    environment: &Environment,
    findings: &mut Findings,
) -> Result<Option<Remembered>, ()> {
    const CHECK: &str = "remembered";
    let checked = Pins::of(environment).map(|pins| pins.get(directory.path())).transpose().and_then(|remembered| {
        let remembered = remembered.flatten();
        if let Some(remembered) = &remembered {
            remembered.check_volume(directory.path(), &sealed.config.volume_id)?;
        }
        Ok(remembered)
    });
    match &checked {
        Ok(Some(_)) => findings.ok(CHECK, "the volume that was here before"),
        Ok(None) => findings.warn(
            CHECK,
            "no volume is remembered here: the first mount trusts what it finds",
            "say what to expect at the first mount: --volume-id and --expect-key",
        ),
        Err(error) if error.code() == Exit::WrongVolume as u8 => {
            findings.fail(CHECK, error.code(), error, Some(&forget_hint(directory.path())));
        }
        Err(error) => findings.fail(CHECK, error.code(), error, None),
    }
    checked.map_err(drop)
}

/// The way out where another volume is remembered.
pub(super) fn forget_hint(directory: &Path) -> String {
    format!("if you moved or replaced the volume yourself: `kmsfs forget {}`", directory.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_decides() {
        let mut findings = Findings::default();
        findings.ok("one", "fine");
        findings.warn("two", "odd", "look");
        assert!(findings.verdict().is_ok());
        findings.fail("three", Exit::Credentials as u8, "bad\u{1b}[2J", None);
        findings.fail("four", Exit::Io as u8, "worse", Some("replace it"));
        let verdict = findings.verdict().unwrap_err();
        assert_eq!(verdict.code(), Exit::Credentials as u8);
        assert!(verdict.to_string().starts_with("2 of 4 checks failed, first three: bad"), "{verdict}");
        let expected = "\
ok    one    fine
warn  two    odd
             -> look
FAIL  three  bad\u{fffd}[2J
FAIL  four   worse
             -> replace it
";
        assert_eq!(findings.text(), expected);
        findings.soften();
        assert!(findings.verdict().is_ok());
    }
}
