//! `kmsfs ls`: the names in a volume, without a mount.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Args;
use time::OffsetDateTime;

use crate::cli::error::CliError;
use crate::cli::report;
use crate::transfer::{Meta, NodeKind, Timestamp, TransferError, Tree};

use super::cat::named;
use super::unmounted::{self, UnlockArgs};

/// List a directory of a volume, without a mount
///
/// One name in a line, in the order of their bytes. May run beside a mount. On a terminal control characters show as U+FFFD.
/// An entry that cannot be looked at shows with question marks, standard error says why, and the exit code is that of the first.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// A directory or file in the volume [default: its root]
    #[arg(value_name = "PATH")]
    path: Option<OsString>,
    /// Show kind and mode, links, owner, group, plain size and modification time (UTC) too
    #[arg(short, long)]
    long: bool,
    /// Show what is in the directories too, by paths from PATH
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Show the path in the cipher directory before each name, and a tab between them
    #[arg(long)]
    cipher: bool,
    /// End each line with a NUL
    #[arg(short = '0', long)]
    null: bool,
    #[command(flatten)]
    unlock: UnlockArgs,
}

/// Lists it.
pub(crate) fn run(args: &LsArgs) -> Result<(), CliError> {
    let volume = unmounted::open(&args.cipher_directory, &args.unlock, false)?;
    let start = args.path.as_ref().map_or(&b""[..], |path| path.as_bytes());
    let failed = |path: &[u8]| {
        let path = String::from_utf8_lossy(path).into_owned();
        move |error| named(&path, error)
    };
    let meta = volume.tree.meta(start).map_err(failed(start))?;
    let mut lines = Lines { tree: &volume.tree, args, printable: io::stdout().is_terminal(), failed: None };
    let is_directory = meta.kind == NodeKind::Directory;
    let shown = if is_directory { lines.directory(start) } else { lines.entry(start, start, Ok(meta)) };
    match (shown, lines.failed) {
        (Err(error), _) if error.kind() != io::ErrorKind::BrokenPipe => Err(CliError::io("standard output", &error)),
        (Ok(()), Some(code)) => Err(CliError::told(code)),
        _ => Ok(()),
    }
}

struct Lines<'a> {
    tree: &'a Tree,
    args: &'a LsArgs,
    printable: bool,
    /// The exit code of the first that could not be looked at.
    failed: Option<u8>,
}

impl Lines<'_> {
    /// Shows the entries of the directory at `start`, by their paths from there. One that cannot be looked at hides no other.
    fn directory(&mut self, start: &[u8]) -> io::Result<()> {
        let join = |a: &[u8], b: &[u8]| if a.is_empty() { b.to_vec() } else { [a, b"/", b].concat() };
        // Those that wait, the next one last: a tree may be deeper than a stack.
        let mut waiting: Vec<(_, _, Option<Result<Meta, _>>)> = vec![(start.to_vec(), Vec::new(), None)];
        while let Some((path, shown, meta)) = waiting.pop() {
            if let Some(meta) = meta {
                let is_directory = meta.as_ref().is_ok_and(|meta| meta.kind == NodeKind::Directory);
                self.entry(&path, &shown, meta)?;
                if !(is_directory && self.args.recursive) {
                    continue;
                }
            }
            match self.tree.list(&path) {
                Ok(entries) => {
                    let below = entries.into_iter().rev();
                    waiting.extend(below.map(|(name, meta)| (join(&path, &name), join(&shown, &name), Some(meta))));
                }
                Err(error) => self.tell(&path, error),
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &[u8], shown: &[u8], meta: Result<Meta, TransferError>) -> io::Result<()> {
        let mut line = Vec::new();
        if self.args.long {
            let details = meta.as_ref().map_or_else(|_| UNKNOWN.to_owned(), details);
            line.extend_from_slice(details.as_bytes());
        }
        line.extend_from_slice(shown);
        match meta {
            Err(error) => self.tell(path, error),
            Ok(meta) if self.args.long && meta.kind == NodeKind::Symlink => {
                line.extend_from_slice(b" -> ");
                match self.tree.readlink(path) {
                    Ok(target) => line.extend(target),
                    Err(error) => self.tell(path, error),
                }
            }
            Ok(_) => {}
        }
        if self.printable {
            line = report::printable(&String::from_utf8_lossy(&line)).into_bytes();
        }
        if self.args.cipher {
            let cipher = self.tree.cipher_path(path).unwrap_or_else(|error| {
                self.tell(path, error);
                "?".to_owned()
            });
            line = [cipher.as_bytes(), b"\t", &line].concat();
        }
        line.push(if self.args.null { 0 } else { b'\n' });
        io::stdout().write_all(&line)
    }

    /// Says why something could not be looked at.
    fn tell(&mut self, path: &[u8], error: TransferError) {
        let error = named(&String::from_utf8_lossy(path), error);
        error.print();
        self.failed.get_or_insert(error.code());
    }
}

/// In place of what [`details`] gives.
const UNKNOWN: &str = "??????????   ?     ?     ?            ?                   ? ";

/// `drwxr-xr-x   2  1000  1000         4096 2026-11-27 10:00:00 `.
fn details(meta: &Meta) -> String {
    let size = match meta.kind {
        NodeKind::CharDevice | NodeKind::BlockDevice => {
            format!("{}, {}", rustix::fs::major(meta.rdev), rustix::fs::minor(meta.rdev))
        }
        _ => meta.size.to_string(),
    };
    let (mode, time) = (mode_text(meta), time_text(meta.mtime));
    format!("{mode} {:>3} {:>5} {:>5} {size:>12} {time} ", meta.nlink, meta.uid, meta.gid)
}

fn mode_text(meta: &Meta) -> String {
    let kind = match meta.kind {
        NodeKind::File => '-',
        NodeKind::Directory => 'd',
        NodeKind::Symlink => 'l',
        NodeKind::Fifo => 'p',
        NodeKind::Socket => 's',
        NodeKind::CharDevice => 'c',
        NodeKind::BlockDevice => 'b',
    };
    let bit = |bit: u32, letter: char| if meta.mode & bit != 0 { letter } else { '-' };
    let execute = |bit: u32, special: u32, letter: char| match (meta.mode & special != 0, meta.mode & bit != 0) {
        (false, false) => '-',
        (false, true) => 'x',
        (true, true) => letter,
        (true, false) => letter.to_ascii_uppercase(),
    };
    let who = |shift: u32| [bit(0o4 << shift, 'r'), bit(0o2 << shift, 'w')];
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        text.extend(who(shift));
        text.push(execute(1 << shift, special, letter));
    }
    text
}

/// In UTC; seconds since 1970 where the year has more than four digits.
fn time_text(time: Timestamp) -> String {
    let Ok(utc) = OffsetDateTime::from_unix_timestamp(time.seconds) else { return format!("@{}", time.seconds) };
    let (date, (hour, minute, second)) = (utc.date(), utc.time().as_hms());
    let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_in_utc() {
        let shown = |seconds| time_text(Timestamp { seconds, nanoseconds: 0 });
        assert_eq!(shown(0), "1970-01-01 00:00:00");
        assert_eq!(shown(-1), "1969-12-31 23:59:59");
        assert_eq!(shown(951_782_399), "2000-02-28 23:59:59");
        assert_eq!(shown(951_868_800), "2000-03-01 00:00:00");
        assert_eq!(shown(1_795_773_600), "2026-11-27 10:00:00");
        assert_eq!(shown(253_402_300_799), "9999-12-31 23:59:59");
        assert_eq!(shown(253_402_300_800), "@253402300800");
    }
}
