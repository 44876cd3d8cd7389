//! System calls of a process that fail because a test wants them to: by strace(1), which needs root.

use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::eventually;

/// Refuses until it is dropped.
pub(crate) struct Refusal(Child);

impl Refusal {
    /// `what` is of strace's option `inject`: calls, the error, and which of them.
    pub(crate) fn of(pid: Pid, what: &[&str]) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-q", "-o", "/dev/null", "-p", &pid.as_raw_pid().to_string()]);
        let mut calls = Vec::new();
        for what in what {
            calls.extend(what.split(':').next());
            command.args(["-e", &format!("inject={what}")]);
        }
        command.args(["-e", &format!("trace={}", calls.join(","))]);
        let refusal = Self(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let is_traced =
            |status: std::io::Result<String>| status.is_ok_and(|status| !status.contains("TracerPid:\t0\n"));
        eventually("every thread is traced", || {
            let threads = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_pid())).unwrap();
            threads.flatten().all(|thread| is_traced(std::fs::read_to_string(thread.path().join("status"))))
        });
        refusal
    }
}

impl Drop for Refusal {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.0), Signal::INT);
        let _ = self.0.wait();
    }
}
