//! Going to the background without forking a process that has threads: the program starts itself again, the new process
//! does all the work, and the first one waits for its word.
//!
//! Invariants:
//! * the first process ends with success only after the second one has said that it is ready;
//! * until then the second process writes its errors to the terminal, and ends when the first one ends;
//! * until then it stays in the process group of whoever asked: while systemd mounts on an automount point, the kernel lets no
//!   other group look at it;
//! * a secret goes down a pipe: the process that stays has it in neither its arguments nor its environment.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

use rustix::process::Signal;
use zeroize::Zeroizing;

const READY: &[u8] = b"ready\n";
/// The longest secret that is handed over: what a pipe holds without a reader.
pub const MAX_SECRET_LEN: usize = 65536;

/// How the background process fared.
#[derive(Debug, PartialEq, Eq)]
pub enum Started {
    /// It is ready.
    Ready,
    /// It ended first, with this exit code, and has said why.
    Failed(u8),
    /// This signal killed it.
    Killed(i32),
}

/// Starts this program again with `arguments` and hands `secret` to it (nothing, if there is none), with those variables of
/// the environment that it `keeps`. Waits until it is ready or has ended.
///
/// # Errors
/// If the process cannot be started.
pub fn start(arguments: &[OsString], secret: Option<&[u8]>, keeps: impl Fn(&OsStr) -> bool) -> io::Result<Started> {
    let mut command = Command::new(env::current_exe()?);
    command.args(arguments).env_clear().envs(env::vars_os().filter(|(name, _)| keeps(name)));
    run(command, secret)
}

fn run(mut command: Command, secret: Option<&[u8]>) -> io::Result<Started> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    if let (Some(mut pipe), Some(secret)) = (child.stdin.take(), secret) {
        // A process that ended before it read its secret has said why.
        let _ = pipe.write_all(secret);
    }
    let mut said = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        pipe.take(READY.len() as u64).read_to_end(&mut said)?;
    }
    if said == READY {
        return Ok(Started::Ready);
    }
    child.wait().map(ended)
}

fn ended(status: ExitStatus) -> Started {
    match (status.code(), status.signal()) {
        (_, Some(signal)) => Started::Killed(signal),
        // A process that ends without a word has failed, whatever it returns.
        (code, None) => {
            Started::Failed(code.and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1))
        }
    }
}

/// The background process's own side.
#[derive(Debug)]
pub struct Background {
    /// What becomes standard input, output and error. Opened before there is a mount, which may lie over it.
    null: io::Result<File>,
}

impl Background {
    /// Takes the secret, if there is one. From here to [`Self::ready`] the end of the
    /// first process is the end of this one.
    ///
    /// # Errors
    /// If this process was not started by [`start`].
    pub fn begin() -> io::Result<(Self, Option<Zeroizing<Vec<u8>>>)> {
        rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
        let mut secret = Zeroizing::new(Vec::with_capacity(MAX_SECRET_LEN));
        // Not through `std::io::Stdin`, whose buffer nobody wipes.
        let pipe = File::from(rustix::stdio::stdin().try_clone_to_owned()?);
        pipe.take(MAX_SECRET_LEN as u64).read_to_end(&mut secret)?;
        let secret = Some(secret).filter(|secret| !secret.is_empty());
        let null = OpenOptions::new().read(true).write(true).open("/dev/null");
        Ok((Self { null }, secret))
    }

    /// Tells the first process that all is well, and lets go of it, of the terminal with its session, and of the current
    /// directory.
    ///
    /// # Errors
    /// If the first process has ended or `/dev/null` is missing.
    pub fn ready(self) -> io::Result<()> {
        rustix::process::set_parent_process_death_signal(None)?;
        rustix::process::setsid()?;
        let null = self.null?;
        let mut stdout = io::stdout();
        stdout.write_all(READY)?;
        stdout.flush()?;
        env::set_current_dir("/")?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, secret: Option<&[u8]>) -> Started {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run(command, secret).unwrap()
    }

    #[test]
    fn waits_for_the_word_only() {
        assert_eq!(shell("echo ready; sleep 5", None), Started::Ready);
    }

    #[test]
    fn an_end_without_a_word_is_a_failure() {
        assert_eq!(shell("exit 7", None), Started::Failed(7));
        assert_eq!(shell("echo read; exit 0", None), Started::Failed(1));
        assert_eq!(shell("kill -9 $$", None), Started::Killed(9));
    }

    #[test]
    fn the_secret_arrives_and_ends() {
        assert_eq!(shell("[ \"$(cat)\" = secret ] && echo ready", Some(b"secret")), Started::Ready);
        assert_eq!(shell("[ \"$(cat)\" = '' ] && echo ready", None), Started::Ready);
        assert_eq!(shell("exit 3", Some(&[0; MAX_SECRET_LEN])), Started::Failed(3));
    }
}
