//! The settings as documentation lists them, made from the flags.

use clap::Args;

use super::settings::{HEADINGS, SETTINGS, SettingsArgs};

/// A setting as documentation lists it.
pub(crate) struct Setting {
    pub(crate) heading: String,
    /// With the name of its value.
    pub(crate) flag: String,
    /// Its key in a settings file, `TABLE.KEY` for a provider's; some settings are flags only.
    pub(crate) key: Option<String>,
    pub(crate) variable: Option<String>,
    pub(crate) help: String,
}

/// All settings, by heading.
pub(crate) fn reference() -> Vec<Setting> {
    let command = SettingsArgs::augment_args(clap::Command::new("settings"));
    let log_file = "Where a mount in the background logs to (kmsfs mount alone)";
    let log_file = clap::Arg::new("log_file").long("log-file").value_name("FILE").help(log_file).help_heading(SETTINGS);
    let mut command = command.arg(log_file);
    command.build();
    let arguments: Vec<_> = command.get_arguments().filter(|arg| arg.get_help_heading().is_some()).collect();
    let of_heading = |heading: &str| {
        let ours = arguments.iter().filter(|arg| arg.get_help_heading() == Some(heading));
        ours.map(|arg| Setting::of(arg)).collect::<Vec<_>>()
    };
    HEADINGS.into_iter().flat_map(of_heading).collect()
}

impl Setting {
    fn of(arg: &clap::Arg) -> Self {
        let name = arg.get_long().unwrap_or_default();
        let heading = arg.get_help_heading().unwrap_or_default();
        let table = ["vault", "pkcs11", "age"].into_iter().find(|table| name.starts_with(&format!("{table}-")));
        let key = if table.is_some() { name.replacen('-', ".", 1) } else { name.to_owned() };
        let variable = if name == "log-level" { "log".to_owned() } else { name.replace('-', "_") };
        let is_flag_only = name == "passphrase";
        Self {
            heading: heading.to_owned(),
            flag: arg.to_string(),
            key: (!is_flag_only && name != "config").then_some(key),
            variable: (!is_flag_only).then(|| format!("KMSFS_{}", variable.to_uppercase())),
            help: arg.get_help().map(ToString::to_string).unwrap_or_default(),
        }
    }
}
