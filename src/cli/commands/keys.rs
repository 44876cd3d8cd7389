//! `kmsfs keys`: a volume's wrapping keys, and data keys that are made ahead for hosts that may only unwrap.

use clap::{Args, Subcommand};

use crate::cli::error::CliError;

use super::keys_list::{self, ListArgs};
use super::keys_provision::{self, ProvisionArgs};

/// Show a volume's wrapping keys, or make data keys for its files ahead
#[derive(Debug, Args)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Debug, Subcommand)]
enum KeysCommand {
    Provision(Box<ProvisionArgs>),
    List(Box<ListArgs>),
}

/// Runs one of them.
pub(crate) fn run(args: &KeysArgs) -> Result<(), CliError> {
    match &args.command {
        KeysCommand::Provision(args) => keys_provision::run(args),
        KeysCommand::List(args) => keys_list::run(args),
    }
}
