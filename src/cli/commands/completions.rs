//! `kmsfs completions`.

use clap::Args;
use clap_complete::Shell;

use crate::cli::arguments;
use crate::cli::error::CliError;
use crate::cli::report;

/// Print the completion script of a shell
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Prints it.
pub(crate) fn run(args: &CompletionsArgs) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut arguments::command(), "kmsfs", &mut script);
    report::say(&String::from_utf8_lossy(&script))
}
