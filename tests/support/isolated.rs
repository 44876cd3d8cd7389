//! Tests in processes of their own.

use std::process::Command;

/// Runs `body` in a new process that executes only the test `name`, with the given environment and without the rest of
/// what configures the SDK: it takes credentials and trust from the environment, which a test program cannot change.
/// What stands before this call in the test runs in both processes.
pub(crate) fn isolated_in(environment: &[(&str, &str)], name: &str, body: impl FnOnce()) {
    const ISOLATED: &str = "KMSFS_TEST_ISOLATED";
    if std::env::var_os(ISOLATED).is_some() {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().expect("a program"));
    command.args(["--exact", name, "--nocapture"]);
    for (variable, _) in std::env::vars_os() {
        let name = variable.to_string_lossy().to_ascii_uppercase();
        if name.starts_with("AWS_") || name.starts_with("SSL_CERT") || name.ends_with("_PROXY") {
            command.env_remove(variable);
        }
    }
    let output = command.env(ISOLATED, "1").envs(environment.iter().copied()).output().expect("a process");
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success() && stdout.contains("1 passed"), "{name}: {stdout}\n{stderr}");
}
