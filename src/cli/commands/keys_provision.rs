//! `kmsfs keys provision`: fills a volume's stock of wrapped data keys, which no file uses yet.
//!
//! Invariants: no plaintext of a data key comes here; every key that was made is in the stock whole, so that a run that
//! was interrupted goes on where it ended; threads end with the first failure that waiting does not mend.

use std::io;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::pins::Pins;
use crate::cli::progress::{self, Step};
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::unlock::{self, Expected};
use crate::cli::{passphrase, report};
use crate::daemon::log::Level;
use crate::keys::{KeyLimits, ProviderKind, Ring};
use crate::storage::{CipherDirectory, KeyStock};

use super::estimate::Cost;

/// While the provider throttles or cannot be reached: the wait before the next try, and how long without any key.
const PAUSE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(60);

/// Make data keys ahead, so that hosts that may only unwrap (kms:Decrypt) can create files
///
/// The keys come wrapped from the KMS (GenerateDataKeyWithoutPlaintext) and are stored in CIPHERDIR/.kmsfs/keys. A mount
/// uses them, each once, when the KMS does not let it make data keys. The stock is filled up to --count: a run that was
/// interrupted is continued by the same command. The volume may be mounted meanwhile.
#[derive(Debug, Args)]
pub(crate) struct ProvisionArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// How many keys the stock is to hold
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    count: u64,
    /// Make so many calls of the key's provider a second at most
    #[arg(long, value_name = "CALLS")]
    kms_rate: Option<NonZeroU32>,
    /// Make so many calls at a time at most
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: u8,
    /// Show the calls and dollars that it would take, and make nothing; needs no key and no network
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// What `--dry-run` shows.
#[derive(Debug, PartialEq, Serialize)]
struct Plan {
    in_stock: u64,
    missing: u64,
    /// GenerateDataKeyWithoutPlaintext, and one Decrypt of the volume key.
    calls: u64,
    dollars: f64,
    /// At the rate of `--kms-rate`, if it is given.
    hours: Option<f64>,
}

/// What `--json` shows at the end.
#[derive(Serialize)]
struct Made {
    made: u64,
    missing: u64,
    in_stock: u64,
}

impl Plan {
    fn of(in_stock: u64, count: u64, kind: Option<ProviderKind>, rate: Option<NonZeroU32>) -> Self {
        let missing = count.saturating_sub(in_stock);
        let calls = if kind.is_some_and(ProviderKind::is_remote) { missing + 1 } else { 0 };
        let priced = if kind == Some(ProviderKind::AwsKms) { calls } else { 0 };
        let cost = Cost::of(calls, rate.map_or(1, NonZeroU32::get));
        Self { in_stock, missing, calls, dollars: Cost::of(priced, 1).dollars, hours: rate.map(|_| cost.hours) }
    }
}

/// Makes them, or shows what that costs.
pub(super) fn run(args: &ProvisionArgs) -> Result<(), CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let directory = CipherDirectory::open(&args.cipher_directory)?;
    let sealed = unlock::read_config(&directory)?;
    let failed = |error: io::Error| CliError::io(directory.path().join(".kmsfs/keys").display(), &error);
    let stock = directory.key_stock().map_err(failed)?;
    if args.dry_run {
        let kind = sealed.config.wrapping_keys.first().and_then(|key| ProviderKind::from_name(&key.provider));
        let in_stock = stock.names().map_err(failed)?.len() as u64;
        return report::print(&Plan::of(in_stock, args.count, kind, args.kms_rate), args.json);
    }
    let secret = passphrase::for_volume(&settings, &environment, Some(&sealed.config))?;
    let providers = settings.for_providers(secret.map(passphrase::for_provider));
    let limits = KeyLimits { calls_per_second: args.kms_rate, ..KeyLimits::default() };
    let pins = Pins::of(&environment);
    let volume = unlock::unlock(directory.path(), &sealed, &Expected::default(), pins.as_ref(), &providers, limits)?;
    stock.tidy().map_err(failed)?;
    let good = good_keys(&stock, &volume.ring).map_err(failed)?;
    let work = Work {
        ring: &volume.ring,
        stock: &stock,
        missing: args.count.saturating_sub(good),
        begun: AtomicU64::new(0),
        made: AtomicU64::new(0),
        failure: Mutex::default(),
        last_success: Mutex::new(Instant::now()),
    };
    work.run(args.parallel);
    stock.sync().map_err(failed)?;
    work.verdict(good, args.json)
}

/// How many entries of the stock are provisioned keys of this volume.
fn good_keys(stock: &KeyStock, ring: &Ring) -> io::Result<u64> {
    let names = stock.names()?;
    let good = names.iter().filter(|name| stock.read(name).is_some_and(|bytes| ring.is_provisioned(name, &bytes)));
    Ok(good.count() as u64)
}

struct Work<'a> {
    ring: &'a Ring,
    stock: &'a KeyStock,
    missing: u64,
    begun: AtomicU64,
    made: AtomicU64,
    failure: Mutex<Option<CliError>>,
    last_success: Mutex<Instant>,
}

impl Work<'_> {
    fn run(&self, parallel: u8) {
        let threads = self.missing.min(parallel.into());
        let step = || {
            let made = self.made.load(Ordering::SeqCst);
            Step { text: format!("{} made", report::part(made, self.missing, "key")), of: Some((made, self.missing)) }
        };
        progress::show_while(step, || {
            std::thread::scope(|scope| {
                let makers: Vec<_> = (0..threads).map(|_| scope.spawn(|| self.make())).collect();
                for maker in makers {
                    // A thread that panicked has printed why, and what it did not make is missing in the end.
                    let _ = maker.join();
                }
            });
        });
    }

    /// Makes keys until there are enough, or one of the threads has failed.
    fn make(&self) {
        while self.failure().is_none() && self.begun.fetch_add(1, Ordering::SeqCst) < self.missing {
            if let Err(error) = self.make_one() {
                self.failure().get_or_insert(error);
            }
        }
    }

    fn make_one(&self) -> Result<(), CliError> {
        loop {
            match self.ring.provision() {
                Ok((name, bytes)) => {
                    self.stock.add(&name, &bytes).map_err(|error| CliError::io(".kmsfs/keys", &error))?;
                    self.made.fetch_add(1, Ordering::SeqCst);
                    *self.last_success() = Instant::now();
                    return Ok(());
                }
                Err(error) if error.is_passing() && self.last_success().elapsed() < PATIENCE => {
                    if self.failure().is_some() {
                        return Ok(());
                    }
                    std::thread::sleep(PAUSE);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn verdict(self, before: u64, json: bool) -> Result<(), CliError> {
        let made = self.made.load(Ordering::SeqCst);
        if json {
            report::print(&Made { made, missing: self.missing - made, in_stock: before + made }, true)?;
        }
        if made == self.missing {
            let made = report::counted(made, "key");
            progress::conclude(&format!("made {made}, {} in stock", before + self.missing), json);
            return Ok(());
        }
        let failure = self.failure().take();
        let (code, why) = failure
            .map_or((Exit::Other as u8, "a thread failed".to_owned()), |error| (error.code(), error.to_string()));
        let what = format!("{} made, {} in stock: {why}", report::part(made, self.missing, "key"), before + made);
        Err(CliError::with_code(code, what).hint("the same command goes on from here"))
    }

    fn failure(&self) -> std::sync::MutexGuard<'_, Option<CliError>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_success(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.last_success.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_counts_what_is_missing_and_the_volume_key() {
        let rate = NonZeroU32::new(100);
        let plan = Plan::of(400, 10_399, Some(ProviderKind::AwsKms), rate);
        assert_eq!((plan.missing, plan.calls, plan.dollars), (9999, 10_000, 0.03));
        assert!((plan.hours.unwrap() - 10_000.0 / 360_000.0).abs() < 1e-9);
        let local = Plan::of(400, 500, Some(ProviderKind::Local), None);
        assert_eq!((local.missing, local.calls, local.dollars, local.hours), (100, 0, 0.0, None));
        assert_eq!(Plan::of(500, 400, Some(ProviderKind::AwsKms), None).missing, 0);
        let vault = Plan::of(0, 9, Some(ProviderKind::Vault), None);
        assert_eq!((vault.calls, vault.dollars), (10, 0.0), "nobody asks for money");
    }
}
