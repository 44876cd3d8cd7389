//! `kmsfs demo`: envelope encryption, told on the real thing: a volume, a mount and a provider that are this program's own.
//!
//! Invariants: what is told was observed just then, and if something is not as it must be the demonstration fails; a plaintext
//! key is never looked at; nothing is left behind, and the wrapping key is not changed.

#[cfg(feature = "mount")]
mod look;
#[cfg(feature = "mount")]
mod provider;
#[cfg(feature = "mount")]
mod scenes;
#[cfg(feature = "mount")]
mod stage;
#[cfg(feature = "mount")]
mod teller;

use clap::Args;

use crate::cli::error::CliError;
use crate::cli::key_spec::KeySpec;
use crate::cli::settings::SettingsArgs;

/// Show how envelope encryption works, on a volume of its own that is gone afterwards
///
/// A data key is born, its header is shown byte by byte, ciphertext is damaged and refused, the key is disabled and the mount goes
/// dark, and the volume moves to another wrapping key. Without --key the embedded provider is used: no account is needed.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// The wrapping key: aws-kms:KEY (ARN, id or alias); it is used, not changed [default: a new local keyring]
    #[arg(long, value_name = "PROVIDER:ID")]
    key: Option<KeySpec>,
    /// The wrapping key that the volume moves to in the end [default: a new local keyring]
    #[arg(long, value_name = "PROVIDER:ID")]
    rewrap_to: Option<KeySpec>,
    /// Wait for Enter after each scene
    #[arg(long, conflicts_with = "json")]
    pause: bool,
    /// Print JSON, one line for each scene
    #[arg(long)]
    json: bool,
    /// Do not use colours (nor with NO_COLOR set, nor where standard output is no terminal)
    #[arg(long)]
    no_color: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Shows it.
#[cfg(feature = "mount")]
pub(crate) fn run(args: &DemoArgs) -> Result<(), CliError> {
    use crate::cli::environment::Environment;
    use crate::cli::settings::{self, Settings};
    use crate::daemon::log::Level;

    for key in [&args.key, &args.rewrap_to].into_iter().flatten() {
        check_keyring(key)?;
    }
    let settings = Settings::load(&args.settings, &Environment::of_process())?;
    // What is refused is refused on purpose here, and told.
    settings::log_to_stderr(&settings, Level::ERROR)?;
    // Without these rights the first sentences would be untrue.
    crate::mount::check_rights(false, false)?;
    let stage = stage::Stage::new(settings)?;
    let teller = teller::Teller::new(args.json, args.no_color, args.pause);
    scenes::Show::new(&stage, teller, args.key.as_ref(), args.rewrap_to.as_ref())
        .run()
        .map_err(|error| stage.explain(error))
}

/// A keyring that is missing would be made, and would be left behind.
#[cfg(feature = "mount")]
fn check_keyring(key: &KeySpec) -> Result<(), CliError> {
    use crate::cli::error::Exit;
    use crate::keys::ProviderKind;

    if key.kind == ProviderKind::Local && !std::path::Path::new(&key.id).exists() {
        return Err(CliError::new(Exit::KeyRefused, format_args!("{key}: there is no such keyring"))
            .hint("without the option the demonstration makes one of its own"));
    }
    Ok(())
}

/// Shows it.
#[cfg(not(feature = "mount"))]
pub(crate) fn run(_: &DemoArgs) -> Result<(), CliError> {
    Err(super::mount::not_built_in(std::path::Path::new("demo")))
}
