//! The command line: arguments, settings, the assembly of everything else, and what is said to people.
//!
//! Invariants:
//! * silence on success; an error, wrong usage included, is one line, `kmsfs: what is wrong`, and at most one `hint:` line on standard error;
//! * every failure has a documented exit code ([`error::Exit`]);
//! * usage errors come before anything is touched, and a command that fails leaves nothing behind that it made;
//! * no secret is printed.

// Only this module talks to people.
#![allow(clippy::print_stdout, clippy::print_stderr)]
// Without FUSE the parts of mounting have no caller but their tests.
#![cfg_attr(not(feature = "mount"), allow(dead_code))]

mod arguments;
mod commands;
mod environment;
mod error;
mod examples;
mod held_directory;
mod in_use;
mod key_spec;
mod listed_key;
mod mount_helper;
mod mount_options;
mod mount_point;
mod open_metrics;
mod passphrase;
mod pins;
mod progress;
mod provider_settings;
#[cfg(feature = "mount")]
mod reach;
mod report;
mod settings;
mod settings_reference;
mod span;
mod unlock;
mod usage;
mod watched;
mod writing;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;

use crate::daemon::HardenError;

use arguments::{Arguments, Command, FIRST_STEPS};
use error::{CliError, Exit};

/// Runs the command that the process's arguments ask for.
#[must_use]
pub fn main() -> ExitCode {
    #[cfg(feature = "mount")]
    if let Some(code) = commands::attend::run_if_asked() {
        return code;
    }
    if std::env::args_os().len() <= 1 {
        // Whoever does not hear it still gets the exit code.
        let _ = write!(std::io::stderr(), "{FIRST_STEPS}");
        return ExitCode::from(Exit::Usage as u8);
    }
    let code = match parse().and_then(|arguments| run(&arguments)) {
        Ok(()) => 0,
        Err(error) => {
            error.print();
            error.code()
        }
    };
    if crate::keys::providers::have_loaded_a_module() {
        crate::daemon::leave(code);
    }
    ExitCode::from(code)
}

/// The process's arguments. Help and version are printed, and end it.
fn parse() -> Result<Arguments, CliError> {
    let words = mount_helper::as_command(std::env::args_os().collect());
    Arguments::try_parse_from(&words).map_err(|error| {
        if error.use_stderr() {
            return usage::error(&error, &words);
        }
        // The examples are put in for those who ask for help alone: that takes a fifth of what a start takes.
        let shown = arguments::command().try_get_matches_from(&words).err();
        shown.unwrap_or(error).exit()
    })
}

fn run(arguments: &Arguments) -> Result<(), CliError> {
    crate::daemon::harden().map_err(|error| match error {
        HardenError::LeaksKeys => CliError::usage(error),
        HardenError::Refused(_) => CliError::new(Exit::Other, error),
    })?;
    match &arguments.command {
        Command::Init(args) => commands::init::run(args),
        Command::Mount(args) => commands::mount::run(args, arguments.background),
        Command::Umount(args) => commands::umount::run(args),
        Command::Status(args) => commands::status::run(args),
        Command::Top(args) => commands::top::run(args),
        Command::Audit(args) => commands::audit::run(args),
        Command::Lock(args) => commands::lock::lock(args),
        Command::Unlock(args) => commands::lock::unlock(args),
        Command::Sync(args) => commands::sync::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Cat(args) => commands::cat::run(args),
        Command::Ls(args) => commands::ls::run(args),
        Command::Export(args) => commands::copy_trees::export(args),
        Command::Import(args) => commands::copy_trees::import(args),
        Command::Shred(args) => commands::shred::run(args),
        Command::Check(args) => commands::check::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Demo(args) => commands::demo::run(args),
        Command::Estimate(args) => commands::estimate::run(args),
        Command::Keys(args) => commands::keys::run(args),
        Command::Rekey(args) => commands::rekey::run(args),
        Command::Rewrap(args) => commands::rewrap::run(args),
        Command::Recipients(args) => commands::recipients::run(args),
        Command::Forget(args) => commands::forget::run(args),
        Command::Speed(args) => commands::speed::run(args),
        Command::Completions(args) => commands::completions::run(args),
        Command::Man(args) => commands::man::run(args),
    }
}
