//! Watching a real mount: the page of metrics as a scraper reads it, `kmsfs top`, and logs for programs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::kms_mount::KmsVolume;
use crate::support::{Argument, Home, Volume, errno, eventually, text};
use serde_json::Value;

/// Reads OpenMetrics text with the parser of Prometheus's own client, and prints its samples as JSON.
const PARSE: &str = "
import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
families = text_string_to_metric_families(sys.stdin.read())
json.dump([[s.name, s.labels, min(s.value, 1e300)] for family in families for s in family.samples], sys.stdout)
";

/// A Python that has that parser.
fn python() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let has_it = |python: &PathBuf| {
        let asked = Command::new(python).args(["-c", "import prometheus_client"]).stderr(Stdio::null()).status();
        asked.is_ok_and(|status| status.success())
    };
    let found = [".venv/bin/python", "target/venv/bin/python"].map(|path| root.join(path)).into_iter().find(has_it);
    found.expect("a Python with prometheus_client: scripts/test installs it")
}

struct Samples(Vec<(String, BTreeMap<String, String>, f64)>);

impl Samples {
    fn parse(page: &str) -> Self {
        let mut parser = Command::new(python())
            .args(["-c", PARSE])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        parser.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
        let output = parser.wait_with_output().unwrap();
        assert!(output.status.success(), "{}\n{page}", text(&output.stderr));
        Self(serde_json::from_slice(&output.stdout).unwrap())
    }

    /// The sum of the samples of this name whose labels are these.
    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let of_name: Vec<_> = self.0.iter().filter(|sample| sample.0 == name).collect();
        assert!(!of_name.is_empty(), "no {name}");
        let matches = |found: &BTreeMap<String, String>| {
            labels.iter().all(|(name, value)| found.get(*name).is_some_and(|found| found == value))
        };
        of_name.iter().filter(|sample| matches(&sample.1)).map(|sample| sample.2).sum()
    }
}

fn ask(mut stream: impl Read + Write) -> String {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, page) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200 OK\r\nContent-Type: application/openmetrics-text; version=1.0.0"), "{head}");
    page.to_owned()
}

/// The page of a mount on loopback.
fn page(volume: &Volume) -> String {
    ask(TcpStream::connect(volume.status()["metrics"].as_str().unwrap()).unwrap())
}

#[test]
fn a_scraper_reads_what_has_happened() {
    let scene = KmsVolume::new(&["--metrics", "127.0.0.1:0", "--no-prefetch", "--audit-log", "audit.log"]);
    let volume = &scene.volume;
    let before = Samples::parse(&page(volume));
    let files = scene.files("f", 5, 10_000);
    scene.make_cold();
    files.iter().for_each(|file| assert_eq!(fs::read(file).unwrap().len(), 10_000));
    scene.server.deny("Decrypt");
    scene.make_cold();
    assert_eq!(errno(File::open(&files[0])), Some(libc::EACCES));
    volume.home.ok(&[&"lock", &volume.plain]);
    let after = Samples::parse(&page(volume));
    let grown = |name: &str, labels: &[(&str, &str)]| after.sum(name, labels) - before.sum(name, labels);
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 0.5, "{found} and not {expected}");
    near(grown("kmsfs_read_bytes_total", &[]), 50_000.0);
    near(grown("kmsfs_written_bytes_total", &[]), 50_000.0);
    near(grown("kmsfs_operation_duration_seconds_count", &[("operation", "create")]), 5.0);
    near(grown("kmsfs_operation_duration_seconds_bucket", &[("operation", "create"), ("le", "+Inf")]), 5.0);
    near(grown("kmsfs_operation_duration_seconds_count", &[("operation", "open")]), 6.0);
    near(after.sum("kmsfs_operation_errors_total", &[("operation", "open"), ("errno", "EACCES")]), 1.0);
    near(after.sum("kmsfs_operation_errors_total", &[]), 1.0);
    near(grown("kmsfs_provider_calls_total", &[("operation", "Decrypt"), ("result", "ok")]), 5.0);
    near(grown("kmsfs_provider_calls_total", &[("operation", "Decrypt"), ("result", "denied")]), 1.0);
    near(grown("kmsfs_provider_call_duration_seconds_count", &[("operation", "Decrypt")]), 6.0);
    near(grown("kmsfs_key_cache_misses_total", &[]), 6.0);
    near(after.sum("kmsfs_locked", &[]) - before.sum("kmsfs_locked", &[]), 1.0);
    let generated = scene.server.calls("GenerateDataKey");
    assert!(after.sum("kmsfs_provider_calls_total", &[("operation", "GenerateDataKey")]) <= generated as f64);
    volume.home.ok(&[&"unlock", &volume.plain]);
    scene.server.allow("Decrypt");
}

/// Whatever the dashboard and the alerts ask for is there.
#[test]
fn the_dashboard_and_the_alerts_know_the_metrics_by_name() {
    let volume = Volume::in_home(Home::new(), &[], &["--metrics", "127.0.0.1:0", "--audit-log", "audit.log"]);
    fs::create_dir(volume.path("d")).unwrap();
    fs::write(volume.path("d/f"), "x").unwrap();
    volume.home.ok(&[&"lock", &volume.plain]);
    // Something fails, so that there is an error to count.
    assert_eq!(errno(fs::write(volume.path("d/f"), "y")), Some(libc::ENOKEY));
    volume.home.ok(&[&"unlock", &volume.plain]);
    let text_of_page = page(&volume);
    let samples = Samples::parse(&text_of_page);
    let known: BTreeSet<_> = samples.0.iter().map(|sample| sample.0.as_str()).collect();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let dashboard = fs::read_to_string(docs.join("grafana-dashboard.json")).unwrap();
    let parsed: Value = serde_json::from_str(&dashboard).unwrap();
    let panels = parsed["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let mut asked: Vec<String> = targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect();
    assert!(asked.len() > 20);
    // Read as YAML, as Prometheus does.
    let alerts = "import json, sys, yaml; rules = yaml.safe_load(open(sys.argv[1]))['groups'][0]['rules']\n\
        assert all(set(rule) <= {'alert', 'expr', 'for', 'labels', 'annotations'} for rule in rules)\n\
        print(json.dumps([[rule['alert'], rule['expr'], rule['annotations']['summary']] for rule in rules]))";
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python"))
        .args(["-c", alerts])
        .arg(docs.join("alerts.yaml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let rules: Vec<[String; 3]> = serde_json::from_slice(&output.stdout).unwrap();
    assert!(rules.len() > 10);
    asked.extend(rules.into_iter().map(|[_, expression, _]| expression));
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for expression in &asked {
        // What is in quotes is a label's value.
        let names = expression.split('"').step_by(2).flat_map(|part| part.split(|c| !word(c)));
        let mut names = names.filter(|name| name.starts_with("kmsfs_")).peekable();
        assert!(names.peek().is_some() || expression.starts_with("up{"), "{expression}");
        for name in names {
            assert!(known.contains(name), "{name} in {expression} is no metric");
        }
    }
    for name in known {
        let family = ["_bucket", "_count", "_sum", "_total"].iter().fold(name, |name, end| name.trim_end_matches(end));
        let explained = text_of_page.lines().any(|line| line.starts_with(&format!("# HELP {family} ")));
        assert!(explained || name == "kmsfs_info", "{name} has no help");
    }
}

#[test]
fn only_this_machine_and_this_user_may_read() {
    let volume = Volume::in_home(Home::new(), &[], &["--metrics", "unix:run/metrics"]);
    let path = volume.home.path("run/metrics");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    Samples::parse(&ask(UnixStream::connect(&path).unwrap()));
    // A killed process leaves its socket: the next mount replaces it, and an unmount removes it.
    volume.kill();
    assert!(path.exists());
    volume.mount();
    Samples::parse(&ask(UnixStream::connect(&path).unwrap()));
    let other = Volume::in_home(Home::new(), &[], &[]);
    other.unmount();
    let refused = |code, address: &str| {
        other.home.refused(code, &[&"mount", &other.cipher, &other.plain, &"--metrics", &address]);
        assert!(!Home::is_mounted(&other.plain));
    };
    for address in ["0.0.0.0:9100", "[::]:9100", "192.0.2.1:1", "example.com:80", "9100", "unix:"] {
        refused(2, address);
    }
    refused(14, &format!("unix:{}", path.display()));
    refused(14, "unix:/nowhere/socket");
    volume.unmount();
    assert!(!path.exists());
}

fn busy(volume: &Volume) {
    for n in 0..20 {
        fs::write(volume.path(format!("f{n}")), vec![n; 100_000]).unwrap();
        fs::read(volume.path(format!("f{n}"))).unwrap();
    }
}

#[test]
fn top_shows_an_interval_to_people_and_programs() {
    let volume = Volume::in_home(Home::new(), &[], &[]);
    let mut arguments: Vec<Argument<'_>> = vec![&"top", &"--once", &"--interval", &"0.2", &volume.plain];
    busy(&volume);
    let shown = volume.home.ok(&arguments);
    assert!(shown.contains("OPERATION") && shown.contains("create") && shown.contains("GenerateDataKey"), "{shown}");
    assert!(!shown.contains('\u{1b}') && shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
    arguments.push(&"--json");
    let frame: Value = serde_json::from_str(&volume.home.ok(&arguments)).unwrap();
    let create = frame["operations"].as_array().unwrap().iter().find(|row| row["operation"] == "create").unwrap();
    assert_eq!((&create["total"], &create["failed"]), (&20.into(), &0.into()));
    let made = &frame["provider"][0];
    assert_eq!((&made["operation"], &made["total"]), (&"GenerateDataKey".into(), &20.into()));
    // Who has seen enough ends it.
    let script = format!("{} top -i 0.1 {} | head -n 40", volume.home.program().display(), volume.plain.display());
    assert_eq!(volume.home.shell(&script).lines().count(), 40);
    volume.home.refused(2, &[&"top", &"-i", &"0", &volume.plain]);
    volume.unmount();
    volume.home.refused(12, &arguments);
}

#[test]
fn top_fits_a_terminal_and_leaves_it_as_it_was() {
    if Command::new("tmux").arg("-V").output().is_err() {
        println!("left out: tmux is not installed");
        return;
    }
    let volume = Volume::in_home(Home::new(), &[], &[]);
    busy(&volume);
    let socket = volume.home.path("tmux");
    let tmux = |arguments: &[&str]| {
        let output = volume.home.command("tmux").arg("-S").arg(&socket).args(arguments).env("TERM", "xterm").output();
        let output = output.unwrap();
        assert!(output.status.success(), "tmux {arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    let command = format!(
        "echo before; {} top -i 0.2 {}; echo ended $?; stty -a; exec sleep 100",
        volume.home.program().display(),
        volume.plain.display()
    );
    tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", &command]);
    let mut screen = String::new();
    eventually("the view is there", || {
        screen = tmux(&["capture-pane", "-p"]);
        screen.contains("rate limit")
    });
    let lines: Vec<_> = screen.trim_end().lines().collect();
    assert!(lines.len() <= 24 && lines[0].starts_with("kmsfs ") && !screen.contains("before"), "{screen}");
    for word in ["OPERATION", "KEY CACHE", "KEY POOL", "PROVIDER CALL", "create"] {
        assert!(screen.contains(word), "{word}: {screen}");
    }
    // Narrow and low is fine too.
    tmux(&["resize-window", "-x", "40", "-y", "10"]);
    eventually("it follows", || {
        tmux(&["capture-pane", "-p"]).lines().next().is_some_and(|line| line.starts_with("kmsfs "))
    });
    tmux(&["resize-window", "-x", "80", "-y", "24"]);
    tmux(&["send-keys", "q"]);
    eventually("it ends", || {
        screen = tmux(&["capture-pane", "-p"]);
        screen.contains("ended 0")
    });
    eventually("the terminal is as before", || {
        screen = tmux(&["capture-pane", "-p"]);
        screen.contains("before") && screen.contains("isig icanon iexten echo ")
    });
    tmux(&["kill-server"]);
}

#[test]
fn a_log_for_programs_names_the_request() {
    let scene = KmsVolume::new(&["--log-format", "json"]);
    let files = scene.files("f", 1, 10);
    scene.set_enabled(false);
    scene.make_cold();
    assert_eq!(errno(File::open(&files[0])), Some(libc::EKEYREVOKED));
    let lines: Vec<Value> = scene.volume.home.logs().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["message"] == "mounted" && line["level"] == "info"), "{lines:?}");
    let refused = lines.iter().find(|line| line["level"] == "warn").unwrap();
    let id = refused["request_id"].as_str().unwrap();
    assert!(id.starts_with("00000000-0000-4000-8000-") && refused["message"].as_str().unwrap().contains(id));
    scene.volume.home.refused(2, &[&"mount", &"--log-format", &"xml", &"a", &"b"]);
    let both = [&"mount" as Argument<'_>, &"--log-format", &"journald", &"--log-file", &"x", &"a", &"b"];
    assert!(scene.volume.home.refused(2, &both).contains("exclude each other"));
}

/// As systemd starts it, with standard error at the journal.
#[test]
fn lines_for_the_journal_have_priorities() {
    use std::os::unix::fs::MetadataExt;
    let volume = Volume::in_home(Home::new(), &[], &[]);
    volume.unmount();
    let error = File::create(volume.home.path("stderr")).unwrap();
    let found = error.metadata().unwrap();
    let mut command = Command::new(volume.home.program());
    command.args(volume.mount_arguments()).args(["--foreground", "--log-format", "text"]).env_clear();
    for (name, place) in [("XDG_DATA_HOME", "data"), ("XDG_STATE_HOME", "state"), ("XDG_RUNTIME_DIR", "run")] {
        command.env(name, volume.home.path(place));
    }
    command.env("JOURNAL_STREAM", format!("{}:{}", found.dev(), found.ino()));
    let mut process = command.stdin(Stdio::null()).stderr(error).spawn().unwrap();
    let said = || fs::read_to_string(volume.home.path("stderr")).unwrap();
    eventually("it says that it is mounted", || said().contains("mounted"));
    volume.unmount();
    assert!(process.wait().unwrap().success());
    let said = said();
    assert!(said.lines().count() >= 2 && said.lines().all(|line| line.starts_with("<6>")), "{said}");
    assert!(said.contains("mounted") && !said.contains("INFO"), "{said}");
}
