//! `kmsfs forget`.

use std::path::PathBuf;

use clap::Args;

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::mount_point;
use crate::cli::pins::Pins;

/// Forget which volume a cipher directory held, so that another one is accepted there
#[derive(Debug, Args)]
pub(crate) struct ForgetArgs {
    /// The cipher directory; it need not exist any more
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
}

/// Forgets it.
pub(crate) fn run(args: &ForgetArgs) -> Result<(), CliError> {
    let pins = Pins::of(&Environment::of_process())
        .ok_or_else(|| CliError::new(Exit::Other, "nothing is remembered without HOME or XDG_DATA_HOME"))?;
    let file = pins.path().display().to_string();
    // What is gone for good is remembered under the path it had.
    let absolute = std::path::absolute(&args.cipher_directory).map_err(|error| CliError::usage(error.to_string()))?;
    let path = mount_point::canonical_or_new(&absolute).unwrap_or(absolute);
    if pins.forget(&path)? {
        return Ok(());
    }
    Err(CliError::new(Exit::CipherDirectory, format_args!("{} is not remembered in {file}", path.display()))
        .hint("another user, or another XDG_DATA_HOME, has a file of their own"))
}
