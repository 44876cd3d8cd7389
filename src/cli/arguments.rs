//! The arguments, as clap reads them; help, completions and manual pages come from here.

use clap::{CommandFactory, Parser, Subcommand};

use super::commands::{
    audit, cat, check, completions, copy_trees, demo, doctor, estimate, forget, init, inspect, keys, lock, ls, man,
    mount, recipients, rekey, rewrap, shred, speed, status, sync, top, umount,
};

use super::examples;
use super::settings;

/// Exit codes with their meanings, one a line.
pub(super) const EXIT_CODES: &str = "\
\x20  0  success
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
 130  interrupted (Ctrl-C)";

const PRECEDENCE: &str = "\
Settings: a flag wins over the environment (KMSFS_*), that over $XDG_CONFIG_HOME/kmsfs/config.toml, and that over
/etc/kmsfs/config.toml. `kmsfs man DIR` writes kmsfs-config(5), which lists them.";

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
#[command(name = "kmsfs", version)]
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

/// The command line, with examples in each command's help. `-h` leaves out the settings that all commands share.
pub(super) fn command() -> clap::Command {
    let command = with_examples(Arguments::command(), "");
    command
        .max_term_width(100)
        .after_help("`kmsfs --help` has the exit codes; `kmsfs COMMAND --help` the options of a command.")
        .after_long_help(format!("Exit codes:\n{EXIT_CODES}\n\n{PRECEDENCE}"))
}

fn with_examples(command: clap::Command, path: &str) -> clap::Command {
    let examples = examples::help(path);
    let shared = |arg: &clap::Arg| arg.get_help_heading().is_some_and(|heading| settings::HEADINGS.contains(&heading));
    let short = if command.get_arguments().any(shared) {
        format!("{examples}\n\n`--help` also has settings, and the options of each key provider.")
    } else {
        examples.clone()
    };
    command
        .after_help(short)
        .after_long_help(examples)
        .mut_args(|arg| if shared(&arg) { arg.hide_short_help(true) } else { arg })
        .mut_subcommands(|inner| {
            let path = format!("{path} {}", inner.get_name()).trim().to_owned();
            with_examples(inner, &path)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        command().debug_assert();
    }

    /// No option of a command's own stands below the heading of settings, and no setting elsewhere.
    #[test]
    fn settings_stand_below_their_headings() {
        fn visit(command: &clap::Command) {
            let settings = <settings::SettingsArgs as clap::Args>::augment_args(clap::Command::new("settings"));
            for arg in command.get_arguments() {
                let is_setting = settings.get_arguments().any(|setting| setting.get_id() == arg.get_id());
                let heading = arg.get_help_heading();
                let below = heading.is_some_and(|heading| settings::HEADINGS.contains(&heading));
                assert_eq!(is_setting, below, "{} {}: {heading:?}", command.get_name(), arg.get_id());
            }
            command.get_subcommands().for_each(visit);
        }
        visit(&command());
    }

    #[test]
    fn every_exit_code_is_documented() {
        for code in crate::cli::error::Exit::ALL {
            assert!(EXIT_CODES.contains(&format!("\n{:>4}  ", code as u8)), "{code:?}");
        }
    }
}
