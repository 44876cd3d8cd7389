//! Wrong usage, told as every other failure is: one line, and one hint.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::error::CliError;
use super::mount_options::MountFlags;

/// What clap found wrong, as this program says it.
pub(super) fn error(error: &clap::Error, arguments: &[OsString]) -> CliError {
    let invalid = context(error, ContextKind::InvalidArg);
    let (message, hint) = match error.kind() {
        ErrorKind::UnknownArgument => {
            let hint = mount_option(arguments).or_else(|| suggestion(error, ContextKind::SuggestedArg));
            let value = invalid.first().filter(|argument| !argument.starts_with('-'));
            let what = value.map_or("there is no option", |_| "there is one argument too many:");
            (format!("{what} {}", invalid.join(" ")), hint)
        }
        ErrorKind::InvalidSubcommand => {
            let name = context(error, ContextKind::InvalidSubcommand).join(" ");
            (format!("there is no command {name}"), suggestion(error, ContextKind::SuggestedSubcommand))
        }
        ErrorKind::MissingRequiredArgument => {
            let verb = if invalid.len() == 1 { "is" } else { "are" };
            (format!("{} {verb} missing", invalid.join(" and ")), usage(error))
        }
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            ("a command is missing".to_owned(), None)
        }
        ErrorKind::InvalidValue => {
            let values = context(error, ContextKind::ValidValue).join(", ");
            let hint = suggestion(error, ContextKind::SuggestedValue);
            (first_line(error), hint.or_else(|| (!values.is_empty()).then(|| format!("the values are {values}"))))
        }
        _ => (first_line(error), None),
    };
    let all = || format!("see `{} --help`", command_of(arguments));
    CliError::usage(message).hint(hint.unwrap_or_else(all))
}

/// What was typed as a flag and is an option of `-o`: `--ro`, `--allow-other`, `-allow_other`.
fn mount_option(arguments: &[OsString]) -> Option<String> {
    let (command, rest) = arguments.get(1..)?.split_first()?;
    let words = rest.iter().filter_map(|word| Some(word.to_str()?.strip_prefix('-')?.trim_start_matches('-')));
    let mut options = words.map(|word| word.replace('-', "_")).filter(|word| word.len() > 1);
    let option = options.find(|word| MountFlags::parse(std::slice::from_ref(word)).is_ok())?;
    (command == "mount").then(|| format!("that is a mount option: -o {option}"))
}

/// What may have been meant, if clap knows something alike.
fn suggestion(error: &clap::Error, kind: ContextKind) -> Option<String> {
    // The likeliest is the last.
    let alike = context(error, kind);
    alike.last().map(|name| format!("there is {name}: was that meant?"))
}

fn usage(error: &clap::Error) -> Option<String> {
    let usage = context(error, ContextKind::Usage).join(" ");
    let usage = usage.split_whitespace().collect::<Vec<_>>().join(" ");
    usage.strip_prefix("Usage: ").map(|usage| format!("usage: {usage}"))
}

/// The command with its sub-command, without options and arguments.
fn command_of(arguments: &[OsString]) -> String {
    let mut command = &crate::cli::arguments::command();
    let mut names = "kmsfs".to_owned();
    for word in arguments.iter().skip(1) {
        let Some(inner) = command.find_subcommand(word) else { break };
        names = format!("{names} {}", inner.get_name());
        command = inner;
    }
    names
}

fn context(error: &clap::Error, kind: ContextKind) -> Vec<String> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => vec![text.clone()],
        Some(ContextValue::Strings(texts)) => texts.clone(),
        Some(ContextValue::StyledStr(text)) => vec![text.to_string()],
        Some(ContextValue::StyledStrs(texts)) => texts.iter().map(ToString::to_string).collect(),
        _ => Vec::new(),
    }
}

/// clap's own words, without its prefix.
fn first_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(line: &str) -> String {
        let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let wrong = crate::cli::arguments::command().try_get_matches_from(&arguments).unwrap_err();
        let wrong = error(&wrong, &arguments);
        assert_eq!(wrong.code(), 2);
        format!("{wrong:?}")
    }

    #[test]
    fn each_mistake_is_named_with_what_to_do() {
        for (line, words) in [
            ("kmsfs mount c p --ro", "no option --ro\", hint: Some(\"that is a mount option: -o ro\""),
            ("kmsfs mount c p --allow-other", "-o allow_other"),
            ("kmsfs mount c p -allow_other", "-o allow_other"),
            ("kmsfs mount c p --log-fil x", "there is --log-file: was that meant?"),
            ("kmsfs mount c p q", "one argument too many: q"),
            ("kmsfs mount c", "<MOUNTPOINT> is missing\", hint: Some(\"usage: kmsfs mount "),
            ("kmsfs mount", "<CIPHERDIR> and <MOUNTPOINT> are missing"),
            ("kmsfs mout c p", "no command mout\", hint: Some(\"there is mount"),
            ("kmsfs keys", "`kmsfs keys --help`"),
            ("kmsfs keys disable --keyring", "see `kmsfs keys disable --help`"),
            ("kmsfs keys rotat", "there is rotate"),
            ("kmsfs mount c p --zzz", "no option --zzz\", hint: Some(\"see `kmsfs mount --help`"),
            ("kmsfs init c --suite rot13", "invalid value 'rot13' for '--suite <SUITE>'"),
            ("kmsfs init c --suite rot13", "the values are auto, "),
            ("kmsfs mount c p --key-max-age 1x", "give seconds, or a number and its unit, as in 90s, 30m"),
            ("kmsfs mount c p --threads 0", "see `kmsfs mount --help`"),
            ("kmsfs mount c p --audit-required", "--audit-log <FILE> is missing"),
            ("kmsfs status --ro", "no option --ro\", hint: Some(\"see `kmsfs status --help`"),
        ] {
            let told = told(line);
            assert!(told.contains(words), "{line}: {told}");
        }
    }
}
