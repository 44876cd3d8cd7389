//! `kmsfs keys`: the wrapping keys of volumes and of local keyrings, and data keys that are made ahead for hosts that may
//! only unwrap.

use clap::{Args, Subcommand};

use crate::cli::error::CliError;

use super::keys_list::{self, ListArgs};
use super::keys_provision::{self, ProvisionArgs};
use super::keys_ring::{self, DisableArgs, EnableArgs, PassphraseArgs, RotateArgs};

/// Show wrapping keys, change those of a local keyring, or make data keys for files ahead
#[derive(Debug, Args)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Debug, Subcommand)]
enum KeysCommand {
    Provision(Box<ProvisionArgs>),
    List(Box<ListArgs>),
    Rotate(Box<RotateArgs>),
    Disable(Box<DisableArgs>),
    Enable(Box<EnableArgs>),
    Passphrase(Box<PassphraseArgs>),
}

/// Runs one of them.
pub(crate) fn run(args: &KeysArgs) -> Result<(), CliError> {
    match &args.command {
        KeysCommand::Provision(args) => keys_provision::run(args),
        KeysCommand::List(args) => keys_list::run(args),
        KeysCommand::Rotate(args) => keys_ring::rotate(args),
        KeysCommand::Disable(args) => keys_ring::disable(args),
        KeysCommand::Enable(args) => keys_ring::enable(args),
        KeysCommand::Passphrase(args) => keys_ring::change_passphrase(args),
    }
}
