//! `kmsfs man`: manual pages of the commands, of mount.kmsfs(8) and of kmsfs-config(5), made from the arguments.

use std::fs;
use std::io;
use std::path::PathBuf;

use clap::{Arg, Args, Command};
use clap_mangen::Man;
use roff::{Roff, bold, italic, roman};

use crate::cli::arguments::{self, EXIT_CODES};
use crate::cli::error::CliError;
use crate::cli::examples;
use crate::cli::mount_options::KNOWN;
use crate::cli::{settings, settings_reference};

/// Write the manual pages into man1, man5 and man8 below a directory
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// An existing directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// The files that a user may look for.
const FILES: [(&str, &str); 5] = [
    ("/etc/kmsfs/config.toml, ~/.config/kmsfs/config.toml", "settings, see kmsfs-config(5)"),
    (
        "~/.local/share/kmsfs/keyring.toml, for root /var/lib/kmsfs",
        "the keyring of volumes that were made without --key",
    ),
    ("~/.local/share/kmsfs/known-volumes.toml, for root /var/lib/kmsfs", "remembered volumes"),
    ("~/.local/state/kmsfs/VOLUME-ID.log, for root /var/log/kmsfs", "the log of a mount in the background"),
    ("CIPHERDIR/.kmsfs/volume.toml, volume.toml.1", "the sealed config of a volume, and its copy"),
];

/// Writes them.
pub(crate) fn run(args: &ManArgs) -> Result<(), CliError> {
    let mut command = arguments::command().disable_help_subcommand(true);
    command.build();
    let pages = pages(&command).map_err(|error| CliError::io("the manual pages", &error))?;
    for (name, page) in pages {
        let section = name.rsplit('.').next().unwrap_or_default();
        let directory = args.directory.join(format!("man{section}"));
        match fs::create_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(CliError::io(directory.display(), &error));
            }
            _ => {}
        }
        let path = directory.join(name);
        fs::write(&path, page).map_err(|error| CliError::io(path.display(), &error))?;
    }
    Ok(())
}

/// File names and texts.
fn pages(command: &Command) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut pages = vec![
        ("mount.kmsfs.8".to_owned(), helper_page(command)?),
        ("kmsfs-config.5".to_owned(), config_page(&settings_reference::reference())?),
    ];
    let mut left = vec![(command, String::new())];
    while let Some((command, path)) = left.pop() {
        let name = command.get_display_name().unwrap_or_else(|| command.get_name());
        pages.push((format!("{name}.1"), command_page(command, &path)?));
        left.extend(command.get_subcommands().filter(|inner| !inner.is_hide_set()).map(|inner| {
            let path = format!("{path} {}", inner.get_name()).trim().to_owned();
            (inner, path)
        }));
    }
    Ok(pages)
}

fn command_page(command: &Command, path: &str) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    let own = command.clone().mut_args(|arg| if is_setting(&arg) { arg.hide(true) } else { arg });
    let has_settings = command.get_arguments().any(is_setting);
    let man = Man::new(own.override_usage(synopsis(command)));
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    let mut roff = Roff::new();
    if has_settings {
        roff.control("SH", ["SETTINGS"]);
        let flags = command.get_arguments().filter(|arg| is_setting(arg)).filter_map(Arg::get_long);
        let flags: Vec<_> = flags.map(|flag| format!("--{flag}")).collect();
        roff.text([roman(format!("{}: see kmsfs-config(5).", flags.join(", ")))]);
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    exit_status(&mut roff);
    files(&mut roff);
    show_examples(&mut roff, examples::of(path));
    see_also(&mut roff, if path.is_empty() { &["mount.kmsfs(8)"] } else { &["kmsfs(1)", "mount.kmsfs(8)"] });
    roff.to_writer(&mut page)?;
    Ok(page)
}

fn is_setting(arg: &Arg) -> bool {
    arg.get_help_heading().is_some_and(|heading| settings::HEADINGS.contains(&heading))
}

/// The command with its own options and their values; settings are one word.
fn synopsis(command: &Command) -> String {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    if let Some(usage) = command.get_overridden_usage() {
        return usage.to_string();
    }
    let options = command.get_arguments().filter(|arg| !arg.is_positional() && !arg.is_hide_set() && !is_setting(arg));
    let mut words = vec![name.to_owned()];
    words.extend(options.filter(|arg| !["help", "version"].contains(&arg.get_id().as_str())).map(|arg| {
        let shown = arg.to_string().replace(['<', '>'], "").replace("...", "");
        if arg.is_required_set() { shown } else { format!("[{shown}]") }
    }));
    if command.get_arguments().any(is_setting) {
        words.push("[SETTINGS]".to_owned());
    }
    words.extend(command.get_positionals().map(|arg| arg.to_string().replace(['<', '>'], "")));
    if command.has_subcommands() {
        words.push("COMMAND".to_owned());
    }
    words.join(" ")
}

fn helper_page(command: &Command) -> io::Result<Vec<u8>> {
    let mut roff = title("mount.kmsfs", "8", "mount a kmsfs volume by mount(8) or from /etc/fstab");
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([bold("mount -t kmsfs"), roman(" [-o OPTIONS] CIPHERDIR MOUNTPOINT")]);
    section(
        &mut roff,
        "DESCRIPTION",
        "mount.kmsfs is a link to kmsfs. mount(8) calls it for the type kmsfs, and it runs `kmsfs mount`. umount(8) ends the \
         mount and does not wait until everything is durable; `kmsfs umount` does.",
    );
    section(
        &mut roff,
        "OPTIONS",
        &format!(
            "Mount options are {KNOWN}. Here the default is suid,dev, as mount(8) has it; write nosuid,nodev where somebody else \
             may write to CIPHERDIR. Options of mount(8) and systemd itself (noauto, nofail, user, x-systemd.automount, ...) are \
             passed over."
        ),
    );
    let mount = command.find_subcommand("mount").into_iter().flat_map(Command::get_arguments);
    let flags = mount.filter(|arg| !arg.is_hide_set()).filter_map(Arg::get_long);
    let flags: Vec<_> = flags.filter(|flag| *flag != "help").map(|flag| flag.replace('-', "_")).collect();
    roff.control("PP", []);
    roff.text([roman(format!(
        "Flags of kmsfs-mount(1) are options too, with _ in the place of -: {}. key_max_age=60 is --key-max-age 60.",
        flags.join(", ")
    ))]);
    exit_status(&mut roff);
    files(&mut roff);
    show_examples(
        &mut roff,
        &[
            ("mount -t kmsfs /srv/cipher /srv/plain -o nosuid,nodev,allow_other", ""),
            ("/srv/cipher /srv/plain kmsfs _netdev,nofail,nosuid,nodev,allow_other 0 0", "a line of /etc/fstab"),
        ],
    );
    see_also(&mut roff, &["kmsfs(1)", "kmsfs-mount(1)", "mount(8)", "fstab(5)"]);
    let mut page = Vec::new();
    roff.to_writer(&mut page)?;
    Ok(page)
}

fn config_page(settings: &[settings_reference::Setting]) -> io::Result<Vec<u8>> {
    let mut roff = title("kmsfs-config", "5", "settings of kmsfs: files, environment, flags");
    section(
        &mut roff,
        "DESCRIPTION",
        "A flag wins over the environment, the environment over ~/.config/kmsfs/config.toml, that over /etc/kmsfs/config.toml. \
         The files are TOML. A key that is not listed here is an error. --config FILE or KMSFS_CONFIG names one file instead of \
         the two.",
    );
    for (index, setting) in settings.iter().enumerate() {
        if index == 0 || settings[index - 1].heading != setting.heading {
            roff.control("SH", [setting.heading.to_uppercase().as_str()]);
        }
        roff.control("TP", []);
        let mut names = vec![bold(setting.flag.as_str())];
        for name in [&setting.key, &setting.variable].into_iter().flatten() {
            names.extend([roman(", "), italic(name.as_str())]);
        }
        roff.text(names);
        roff.text([roman(setting.help.as_str())]);
    }
    section(
        &mut roff,
        "ENVIRONMENT",
        "KMSFS_PASSPHRASE holds the passphrase itself. AWS credentials, Region and endpoints come from AWS_*, the profile files \
         and the metadata services, as for every program that uses the AWS SDK.",
    );
    files(&mut roff);
    roff.control("SH", ["EXAMPLES"]);
    roff.control("nf", []);
    for line in [
        "region = \"eu-central-1\"",
        "kms-operation-timeout = 10",
        "",
        "[vault]",
        "address = \"https://bao.example.com:8200\"",
    ] {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    see_also(&mut roff, &["kmsfs(1)", "kmsfs-mount(1)"]);
    let mut page = Vec::new();
    roff.to_writer(&mut page)?;
    Ok(page)
}

fn title(name: &str, section: &str, purpose: &str) -> Roff {
    let mut roff = Roff::new();
    let version = format!("kmsfs {}", env!("CARGO_PKG_VERSION"));
    roff.control("TH", [name, section, "", version.as_str()]);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{name} - {purpose}"))]);
    roff
}

fn section(roff: &mut Roff, heading: &str, text: &str) {
    roff.control("SH", [heading]);
    roff.text([roman(text)]);
}

fn exit_status(roff: &mut Roff) {
    roff.control("SH", ["EXIT STATUS"]);
    for line in EXIT_CODES.lines() {
        let (code, meaning) = line.trim().split_once("  ").unwrap_or((line, ""));
        roff.control("TP", ["6"]);
        roff.text([bold(code)]);
        roff.text([roman(meaning)]);
    }
}

fn files(roff: &mut Roff) {
    roff.control("SH", ["FILES"]);
    for (path, purpose) in FILES {
        roff.control("TP", []);
        roff.text([italic(path)]);
        roff.text([roman(purpose)]);
    }
}

fn show_examples(roff: &mut Roff, lines: &[(&str, &str)]) {
    if lines.is_empty() {
        return;
    }
    roff.control("SH", ["EXAMPLES"]);
    for (line, purpose) in lines {
        roff.control("TP", []);
        roff.text([bold(*line)]);
        roff.text([roman(*purpose)]);
    }
}

fn see_also(roff: &mut Roff, pages: &[&str]) {
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman([pages, &["kmsfs-config(5)"]].concat().join(", "))]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_has_its_sections_and_options_with_values() {
        let mut command = arguments::command().disable_help_subcommand(true);
        command.build();
        let pages = pages(&command).unwrap();
        for (name, page) in &pages {
            let page = String::from_utf8(page.clone()).unwrap();
            let exit = if name.ends_with(".5") { "ENVIRONMENT" } else { "\"EXIT STATUS\"" };
            for section in ["NAME", exit, "FILES", "\"SEE ALSO\""] {
                assert!(page.contains(&format!(".SH {section}")), "{name} lacks {section}");
            }
            assert!(page.contains(".SH EXAMPLES") || name == "kmsfs.1", "{name} lacks EXAMPLES");
        }
        let page = |wanted: &str| {
            let (_, page) = pages.iter().find(|(name, _)| name == wanted).unwrap();
            String::from_utf8(page.clone()).unwrap().replace('\\', "")
        };
        let mount = page("kmsfs-mount.1");
        assert!(mount.contains("[--key-max-age DURATION]") && mount.contains("[-o OPTIONS]"), "{mount}");
        assert!(!mount.contains(".TPnfB--region"), "{mount}");
        assert!(page("kmsfs-config.5").contains("KMSFS_REGION"));
        assert!(page("mount.kmsfs.8").contains("key_max_age"));
    }
}
