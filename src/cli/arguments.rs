//! The arguments, as clap reads them; help, completions and manual pages come from here.

use clap::{Parser, Subcommand};

use super::commands::{
    audit, cat, check, completions, copy_trees, demo, doctor, estimate, forget, init, inspect, keys, lock, ls, man,
    mount, recipients, rekey, rewrap, shred, speed, status, sync, top, umount,
};

const EXIT_CODES: &str = "\
Exit codes:
   0  success
   1  any other failure
   2  wrong usage or settings
   3  cipher directory missing, not a volume, not empty at init, or in use elsewhere
   4  volume config malformed, tampered with or of an unknown version
   5  not the expected volume
   6  key refused or unusable: denied, disabled, not found, wrong key
   7  passphrase or credentials missing or wrong
   8  key provider unreachable or too slow
   9  mount point unusable: missing, not an empty directory, inside or above the cipher directory
  10  FUSE not available
  11  volume already mounted or locked
  12  not mounted
  13  something does not authenticate, or a part of it is missing
  14  read-only or full filesystem, or another I/O error
  15  check found something that is not as it should be, and nothing that is lost; or an audit log that lacks records

Environment: KMSFS_PASSPHRASE, KMSFS_PASSPHRASE_FILE, KMSFS_KEYRING, KMSFS_REGION, KMSFS_ENDPOINT_URL, KMSFS_FIPS,
KMSFS_KMS_ATTEMPT_TIMEOUT, KMSFS_KMS_OPERATION_TIMEOUT, KMSFS_LOG, KMSFS_LOG_FORMAT, KMSFS_LOG_FILE, KMSFS_CONFIG.
Settings files: /etc/kmsfs/config.toml and $XDG_CONFIG_HOME/kmsfs/config.toml, or the one of --config.
A flag wins over the environment, that over the user's file, and that over the system's.";

/// What is said to somebody who gives no arguments.
pub(super) const FIRST_STEPS: &str = "\
kmsfs encrypts directories transparently with keys from a KMS.

  kmsfs demo                          how it works, on a volume that is gone afterwards
  kmsfs init CIPHERDIR                make a volume; --key aws-kms:KEY for one under AWS KMS
  kmsfs mount CIPHERDIR MOUNTPOINT    use it
  kmsfs umount MOUNTPOINT
  kmsfs doctor CIPHERDIR              what is wrong, and what to do about it

`kmsfs --help` has all commands, `kmsfs COMMAND --help` their options.
";

/// Encrypt directories transparently with keys from a KMS.
#[derive(Debug, Parser)]
#[command(name = "kmsfs", version, after_help = EXIT_CODES)]
pub(super) struct Arguments {
    /// This process is the one that `kmsfs mount` left in the background.
    #[arg(long, hide = true)]
    pub(super) background: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Init(init::InitArgs),
    Mount(Box<mount::MountArgs>),
    Umount(umount::UmountArgs),
    Status(status::StatusArgs),
    Top(top::TopArgs),
    Audit(audit::AuditArgs),
    Lock(lock::LockArgs),
    Unlock(lock::UnlockArgs),
    Sync(sync::SyncArgs),
    Inspect(inspect::InspectArgs),
    Cat(Box<cat::CatArgs>),
    Ls(Box<ls::LsArgs>),
    Export(Box<copy_trees::ExportArgs>),
    Import(Box<copy_trees::ImportArgs>),
    Shred(Box<shred::ShredArgs>),
    Check(Box<check::CheckArgs>),
    Doctor(Box<doctor::DoctorArgs>),
    Demo(Box<demo::DemoArgs>),
    Estimate(estimate::EstimateArgs),
    Keys(keys::KeysArgs),
    Rekey(Box<rekey::RekeyArgs>),
    Rewrap(Box<rewrap::RewrapArgs>),
    Recipients(recipients::RecipientsArgs),
    Forget(forget::ForgetArgs),
    Speed(speed::SpeedArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_exit_code_is_documented() {
        for code in crate::cli::error::Exit::ALL {
            assert!(EXIT_CODES.contains(&format!("\n  {:>2}  ", code as u8)), "{code:?}");
        }
    }
}
