//! Examples of each command, for its help and its manual page.

/// A command, and the lines that show its use.
type Examples = (&'static str, &'static [(&'static str, &'static str)]);

/// By the command's name without `kmsfs`: a line for the shell, and its purpose.
const EXAMPLES: &[Examples] = &[
    (
        "init",
        &[
            ("kmsfs init /srv/cipher", "under a keyring in your data directory"),
            ("kmsfs init /srv/cipher --key aws-kms:alias/app-data", "under a key of AWS KMS"),
            ("kmsfs init /srv/cipher --key local:/etc/kmsfs/data.toml --passphrase", "under a sealed keyring"),
        ],
    ),
    (
        "mount",
        &[
            ("kmsfs mount /srv/cipher /srv/plain", "for this user alone"),
            ("kmsfs mount /srv/cipher /srv/plain -o allow_other", "for other users too"),
            ("kmsfs mount /srv/cipher /srv/plain --read-only", "refusing every change"),
            ("kmsfs mount /srv/cipher /srv/plain --key-max-age 60", "a revoked key stops within a minute"),
        ],
    ),
    ("umount", &[("kmsfs umount /srv/plain", "returns when everything is on the disk")]),
    (
        "status",
        &[
            ("kmsfs status", "all mounts"),
            ("kmsfs status /srv/plain", "one of them"),
            ("kmsfs status /srv/plain --keys", "the keys that its files need"),
        ],
    ),
    ("top", &[("kmsfs top /srv/plain", "live"), ("kmsfs top /srv/plain --once --json", "one interval, for a script")]),
    ("audit", &[("kmsfs audit verify /var/log/kmsfs/audit.log --volume /srv/cipher", "is the log whole?")]),
    (
        "audit verify",
        &[
            ("kmsfs audit verify audit.log --volume /srv/cipher", "needs the volume's key"),
            ("kmsfs audit verify audit.log --hashes-only", "needs no key, and proves less"),
        ],
    ),
    ("audit show", &[("kmsfs audit show audit.log --failed", "calls that a provider refused")]),
    ("lock", &[("kmsfs lock /srv/plain", "files answer ENOKEY until `kmsfs unlock`")]),
    ("unlock", &[("kmsfs unlock /srv/plain", "files ask for their keys again")]),
    ("sync", &[("kmsfs sync /srv/plain", "everything written before is durable")]),
    (
        "inspect",
        &[
            ("kmsfs inspect /srv/cipher", "the volume's config"),
            ("kmsfs inspect --html page.html /srv/cipher/FILE", "a drawing of a ciphertext file"),
        ],
    ),
    ("cat", &[("kmsfs cat /srv/cipher letters/to-anna", "a file, without a mount")]),
    ("ls", &[("kmsfs ls -lR /srv/cipher", "the whole tree, without a mount")]),
    ("export", &[("kmsfs export /srv/cipher letters ./letters --verify", "a directory, read back and compared")]),
    ("import", &[("kmsfs import ./photos /srv/cipher photos --verify", "a directory, read back and compared")]),
    (
        "shred",
        &[
            ("kmsfs shred /srv/cipher letters/to-anna", "shows what it would do"),
            ("kmsfs shred /srv/cipher letters/to-anna --yes", "does it"),
        ],
    ),
    (
        "check",
        &[
            ("kmsfs check /srv/cipher", "reads and authenticates everything"),
            ("kmsfs check /srv/cipher --structure", "what can be checked without a key"),
            ("kmsfs check /srv/cipher --salvage rescued", "copies what still opens of damaged files"),
        ],
    ),
    (
        "doctor",
        &[
            ("kmsfs doctor /srv/cipher", "can this host read and create files?"),
            ("kmsfs doctor /srv/cipher --policy", "the IAM policy for this volume alone"),
        ],
    ),
    ("demo", &[("kmsfs demo --pause", "one scene after the other")]),
    ("estimate", &[("kmsfs estimate ~/photos", "what it would cost under AWS KMS")]),
    ("keys", &[("kmsfs keys list", "the keys of your keyring"), ("kmsfs keys rotate", "a new version of its newest")]),
    (
        "keys list",
        &[
            ("kmsfs keys list", "of your keyring"),
            ("kmsfs keys list /srv/cipher --files", "of a volume, with the files that need each"),
        ],
    ),
    ("keys provision", &[("kmsfs keys provision /srv/cipher --count 10000", "for hosts that may only decrypt")]),
    ("keys rotate", &[("kmsfs keys rotate --keyring /etc/kmsfs/data.toml", "back the keyring up afterwards")]),
    ("keys disable", &[("kmsfs keys disable local:k-a1148dfa6ba2c7ea", "stops within --key-max-age")]),
    ("keys enable", &[("kmsfs keys enable local:k-a1148dfa6ba2c7ea", "works again")]),
    (
        "keys passphrase",
        &[
            ("kmsfs keys passphrase", "asks for the new one"),
            ("kmsfs keys passphrase --passphrase --remove", "asks for the old one; none from then on"),
        ],
    ),
    (
        "rekey",
        &[
            ("kmsfs rekey /srv/cipher --dry-run", "shows what it would take"),
            ("kmsfs rekey /srv/cipher letters", "one directory"),
        ],
    ),
    (
        "rewrap",
        &[
            ("kmsfs rewrap /srv/cipher --to aws-kms:alias/next --dry-run", "shows what it would take"),
            ("kmsfs rewrap /srv/cipher --to aws-kms:alias/next", "moves the volume to another key"),
            ("kmsfs rewrap /srv/cipher", "gives old files the records of new recipients"),
        ],
    ),
    ("recipients", &[("kmsfs recipients list /srv/cipher", "the keys that open the volume")]),
    (
        "recipients add",
        &[("kmsfs recipients add /srv/cipher local:/media/safe/recovery.toml", "then `kmsfs rewrap /srv/cipher`")],
    ),
    ("recipients remove", &[("kmsfs recipients remove /srv/cipher local:k-a1148dfa6ba2c7ea", "as `list` names it")]),
    ("recipients list", &[("kmsfs recipients list /srv/cipher", "asks no provider")]),
    ("forget", &[("kmsfs forget /srv/cipher", "the next mount accepts another volume there")]),
    ("speed", &[("kmsfs speed", "of both cipher suites on this CPU")]),
    ("completions", &[("kmsfs completions bash >~/.local/share/bash-completion/completions/kmsfs", "for this user")]),
    ("man", &[("kmsfs man ~/.local/share/man", "for this user")]),
];

/// Lines for the shell and their purposes.
pub(super) fn of(command: &str) -> &'static [(&'static str, &'static str)] {
    EXAMPLES.iter().find(|(name, _)| *name == command).map_or(&[], |(_, lines)| lines)
}

/// The same as the help shows them; empty for a command without any.
pub(super) fn help(command: &str) -> String {
    let lines = of(command);
    let width = lines.iter().map(|(line, _)| line.len()).max().unwrap_or(0);
    let one_line = width <= 60;
    let shown = lines.iter().map(|(line, purpose)| {
        if one_line { format!("\n  {line:width$}  # {purpose}") } else { format!("\n  # {purpose}\n  {line}") }
    });
    if lines.is_empty() { String::new() } else { format!("Examples:{}", shown.collect::<String>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_example_is_of_its_command_and_parses() {
        for (name, lines) in EXAMPLES {
            for (line, _) in *lines {
                let words: Vec<_> = line.split(' ').take_while(|word| !word.starts_with('>')).collect();
                assert!(line.starts_with(&format!("kmsfs {name} ")) || *line == format!("kmsfs {name}"), "{line}");
                let parsed = crate::cli::arguments::command().try_get_matches_from(words);
                assert!(parsed.is_ok(), "{line}: {parsed:?}");
            }
        }
    }

    #[test]
    fn each_command_has_one() {
        fn visit(command: &clap::Command, path: &str) {
            for inner in command.get_subcommands() {
                let name = format!("{path} {}", inner.get_name()).trim().to_owned();
                assert!(!of(&name).is_empty(), "{name}");
                visit(inner, &name);
            }
        }
        visit(&crate::cli::arguments::command(), "");
    }
}
