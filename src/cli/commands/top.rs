//! x
use clap::Args;
use crate::cli::error::CliError;
/// Watch a mount
#[derive(Debug, Args)]
pub(crate) struct TopArgs { mountpoint: std::path::PathBuf }
pub(crate) fn run(_: &TopArgs) -> Result<(), CliError> { Ok(()) }
