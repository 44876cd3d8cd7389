//! `kmsfs man`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use crate::cli::arguments::Arguments;
use crate::cli::error::CliError;

/// Write the manual pages into a directory
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// An existing directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Writes them.
pub(crate) fn run(args: &ManArgs) -> Result<(), CliError> {
    clap_mangen::generate_to(Arguments::command(), &args.directory)
        .map_err(|error| CliError::io(args.directory.display(), &error))
}
