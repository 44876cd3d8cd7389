//! That the sandbox of a mount bites: a process enters it and tries what it must not be able to do, and what it must. Each
//! attempt is made without the sandbox too, so that one that fails for another reason is no proof.
#![allow(clippy::unwrap_used)] // it is how a test fails
#![allow(unsafe_code, clippy::undocumented_unsafe_blocks)] // system calls without arguments, which the kernel refuses
#![allow(clippy::print_stdout)] // how an attempt tells its outcome

mod support;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::support::{Home, Volume};
use kmsfs::daemon::sandbox::{self, Reach};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket, socketpair};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Where the process that tries finds its files.
const PLACE: &str = "KMSFS_TEST_SANDBOX_PLACE";
/// What it is granted.
const GRANT: &str = "KMSFS_TEST_SANDBOX_GRANT";

/// The program that is to run as if the kernel had no Landlock.
const WITHOUT_LANDLOCK: &str = "KMSFS_TEST_WITHOUT_LANDLOCK";

type Outcomes = BTreeMap<String, String>;

/// The sandbox wants to be entered by the only thread there is, which no test of the usual kind is.
fn main() -> ExitCode {
    if let Some(place) = std::env::var_os(PLACE).map(PathBuf::from) {
        attempts(&place);
        return ExitCode::SUCCESS;
    }
    if let Some(program) = std::env::var_os(WITHOUT_LANDLOCK) {
        panic!("{}", run_without_landlock(&program));
    }
    let tests: &[(&str, fn())] = &[
        ("each_rule_bites_and_each_need_is_met", each_rule_bites_and_each_need_is_met),
        ("a_remote_provider_adds_connections_and_nothing_else", a_remote_provider_adds_connections_and_nothing_else),
        ("a_program_may_reach_services", a_program_may_reach_services),
        ("a_live_mount_is_held_in_all_its_threads_and_says_so", a_live_mount_is_held_in_all_its_threads_and_says_so),
        ("the_switch_turns_it_off", the_switch_turns_it_off),
        ("a_kernel_without_landlock_is_told_and_the_rest_holds", a_kernel_without_landlock_is_told_and_the_rest_holds),
        ("an_ordinary_user_is_held_and_a_signal_still_unmounts", an_ordinary_user_is_held_and_a_signal_still_unmounts),
        #[cfg(feature = "aws-kms")]
        ("a_mount_that_made_its_volume_under_a_kms_is_held", a_mount_that_made_its_volume_under_a_kms_is_held),
    ];
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let mut failed = false;
    for (name, test) in tests.iter().copied() {
        if wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str())) {
            let passed = std::panic::catch_unwind(test).is_ok();
            println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
            failed |= !passed;
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// The process that tries: it enters the sandbox and prints a line for each attempt.
fn attempts(place: &Path) {
    let grant = std::env::var(GRANT).unwrap();
    let reach = Reach {
        read: vec![place.join("read"), "/proc".into(), place.join("file")],
        everything: vec![place.join("cipher")],
        make: vec![place.join("make")],
        network: grant == "network",
        programs: grant == "programs",
        abstract_sockets: false,
        local_sockets: grant == "programs",
    };
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    let _services = [place.join("stream"), place.join("read/stream")].map(|path| UnixListener::bind(path).unwrap());
    let _datagrams = UnixDatagram::bind(place.join("datagram")).unwrap();
    let own = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    if grant != "nothing" {
        let confinement = sandbox::enter(&reach);
        println!("ATTEMPT gaps={}", confinement.gaps().join(";").replace(' ', "_"));
    }
    let listen = || bind(&own, &SocketAddrUnix::new(place.join("make/socket"))?).and_then(|()| listen(&own, 1));
    let mut outcomes = vec![("listen on a socket made before", listen().map_err(io::Error::from))];
    outcomes.extend(files(place));
    outcomes.extend(services(place));
    for (name, outcome) in outcomes.into_iter().chain(network(&target)).chain(system_calls()) {
        let outcome = outcome.map_or_else(|error| format!("{:?}", error.kind()), |()| "done".to_owned());
        println!("ATTEMPT {name}={outcome}");
    }
}

type Attempts = Vec<(&'static str, io::Result<()>)>;

fn files(place: &Path) -> Attempts {
    let at = |name: &str| place.join(name);
    let replace = |from: &str, to: &str| fs::rename(at(from), at(to));
    vec![
        ("read a granted file", fs::read(at("file")).map(drop)),
        ("read below a granted directory", fs::read(at("read/a")).map(drop)),
        ("write below it", fs::write(at("read/a"), "x")),
        ("read a neighbour", fs::read(at("secret")).map(drop)),
        ("read a neighbour by a link", fs::read(at("cipher/link")).map(drop)),
        ("read the passwords", fs::read("/etc/shadow").map(drop)),
        ("list the root directory", fs::read_dir("/").map(drop)),
        ("write to a neighbour", fs::write(at("secret"), "x")),
        ("make a neighbour", fs::write(at("new"), "x")),
        ("remove a neighbour", fs::remove_file(at("removable"))),
        ("write a log", fs::write(at("make/log"), "x")),
        ("make a directory beside the log", fs::create_dir(at("make/directory"))),
        ("make in the volume", fs::create_dir(at("cipher/d")).and_then(|()| fs::write(at("cipher/d/f"), "x"))),
        ("move in the volume", replace("cipher/d/f", "cipher/g")),
        ("link in the volume", fs::hard_link(at("cipher/g"), at("cipher/d/h"))),
        ("cut in the volume", File::create(at("cipher/g")).map(drop)),
        ("move out of the volume", replace("cipher/g", "make/g")),
        ("see a caller", fs::read("/proc/1/status").map(drop)),
        ("write to the kernel", File::options().write(true).open("/proc/sys/kernel/core_pattern").map(drop)),
    ]
}

/// What listens at a path on this machine: a container runtime, a service manager.
fn services(place: &Path) -> Attempts {
    let pair = |kind| socketpair(AddressFamily::UNIX, kind, SocketFlags::empty(), None).map_err(io::Error::from);
    let datagram = place.join("datagram");
    let by_a_pair = |kind| {
        let address = SocketAddrUnix::new(&datagram)?;
        Ok(connect(pair(kind)?.0, &address)?)
    };
    vec![
        ("connect to a service", UnixStream::connect(place.join("stream")).map(drop)),
        ("connect to a service in a granted directory", UnixStream::connect(place.join("read/stream")).map(drop)),
        ("send to a service", UnixDatagram::unbound().and_then(|from| from.send_to(b"x", &datagram)).map(drop)),
        ("send to a service by a pair", by_a_pair(SocketType::DGRAM)),
        ("send to a service by a raw pair", by_a_pair(SocketType::RAW)),
        ("make a pair", pair(SocketType::STREAM).map(drop)),
    ]
}

fn network(target: &TcpListener) -> Attempts {
    vec![
        ("connect", TcpStream::connect(target.local_addr().unwrap()).map(drop)),
        ("listen", TcpListener::bind("127.0.0.1:0").map(drop)),
        ("send a datagram", UdpSocket::bind("127.0.0.1:0").map(drop)),
        ("start a program", Command::new("/bin/true").status().map(drop)),
        (
            "be dumped",
            Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable))
                .and_then(|done| done.map_err(io::Error::from)),
        ),
    ]
}

/// Calls with senseless arguments: what is not refused fails for another reason, or does nothing.
fn system_calls() -> Attempts {
    let calls = [
        ("call ptrace", libc::SYS_ptrace),
        ("call process_vm_readv", libc::SYS_process_vm_readv),
        ("call mount", libc::SYS_mount),
        ("call umount2", libc::SYS_umount2),
        ("call fsopen", libc::SYS_fsopen),
        ("call unshare", libc::SYS_unshare),
        ("call setns", libc::SYS_setns),
        ("call clone for namespaces", libc::SYS_clone),
        ("call chroot", libc::SYS_chroot),
        ("call init_module", libc::SYS_init_module),
        ("call bpf", libc::SYS_bpf),
        ("call keyctl", libc::SYS_keyctl),
        ("call add_key", libc::SYS_add_key),
        ("call io_uring_setup", libc::SYS_io_uring_setup),
        ("call perf_event_open", libc::SYS_perf_event_open),
        ("call userfaultfd", libc::SYS_userfaultfd),
        ("call swapon", libc::SYS_swapon),
        ("call open_by_handle_at", libc::SYS_open_by_handle_at),
    ];
    calls.map(|(name, call)| (name, raw(call))).into_iter().collect()
}

fn raw(call: libc::c_long) -> io::Result<()> {
    match unsafe { libc::syscall(call, -1, 0, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()).or_else(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => Err(error),
            // It was let through, and makes no sense.
            _ => Ok(()),
        }),
        _ => Ok(()),
    }
}

fn outcomes(grant: &str) -> Outcomes {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    for directory in ["read", "cipher", "make"] {
        fs::create_dir(at(directory)).unwrap();
    }
    for file in ["file", "read/a", "secret", "removable"] {
        fs::write(at(file), "content").unwrap();
    }
    symlink(at("secret"), at("cipher/link")).unwrap();
    let output =
        Command::new(std::env::current_exe().unwrap()).env(PLACE, home.path()).env(GRANT, grant).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter_map(|line| line.split("ATTEMPT ").nth(1));
    let outcomes: Outcomes =
        lines.map(|line| line.split_once('=').unwrap()).map(|(a, b)| (a.to_owned(), b.to_owned())).collect();
    assert!(outcomes.len() > 40, "{text}{}", String::from_utf8_lossy(&output.stderr));
    outcomes
}

/// What a mount must go on to do.
const NEEDED: [&str; 10] = [
    "read a granted file",
    "read below a granted directory",
    "write a log",
    "listen on a socket made before",
    "make a pair",
    "make in the volume",
    "move in the volume",
    "link in the volume",
    "cut in the volume",
    "see a caller",
];

fn has_landlock() -> bool {
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    version >= 6
}

fn each_rule_bites_and_each_need_is_met() {
    support::needs_root();
    if !has_landlock() {
        println!("skipped: this kernel has no Landlock 6");
        return;
    }
    let without = outcomes("nothing");
    let within = outcomes("local");
    assert_eq!(within["gaps"], "", "{within:?}");
    for (attempt, outcome) in &without {
        assert_eq!(outcome, "done", "{attempt} fails without a sandbox: it proves nothing");
    }
    for (attempt, outcome) in within.iter().filter(|(attempt, _)| *attempt != "gaps") {
        let expected = match attempt.as_str() {
            needed if NEEDED.contains(&needed) => "done",
            // How Landlock refuses to move a file to where it would be granted otherwise.
            "move out of the volume" => "CrossesDevices",
            _ => "PermissionDenied",
        };
        assert_eq!(outcome, expected, "{attempt}");
    }
}

fn a_remote_provider_adds_connections_and_nothing_else() {
    support::needs_root();
    let (local, remote) = (outcomes("local"), outcomes("network"));
    let differ: Vec<&str> = local.keys().filter(|key| local[*key] != remote[*key]).map(String::as_str).collect();
    let expected: &[&str] =
        if has_landlock() { &["connect", "send a datagram"] } else { &["connect", "listen", "send a datagram"] };
    assert_eq!(differ, expected);
}

/// A module of PKCS #11 may need a service, and a program that signs in an agent.
fn a_program_may_reach_services() {
    let outcomes = outcomes("programs");
    for attempt in ["connect to a service", "send to a service"] {
        assert_eq!(outcomes[attempt], "done", "{attempt}");
    }
}

fn a_live_mount_is_held_in_all_its_threads_and_says_so() {
    let volume = Volume::new(&[]);
    let status = volume.status();
    if has_landlock() {
        assert!(status["sandbox_files"].as_str().unwrap().starts_with("on (Landlock "), "{status}");
    }
    assert_eq!(status["sandbox_system_calls"], "on");
    assert_eq!((&status["sandbox_network"], &status["sandbox_programs"]), (&"none".into(), &"none".into()));
    let tasks = fs::read_dir(format!("/proc/{}/task", status["pid"])).unwrap();
    let states: Vec<String> =
        tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap()).collect();
    assert!(states.len() > 4, "only {} threads", states.len());
    for state in states {
        assert!(state.contains("\nNoNewPrivs:\t1\n") && state.contains("\nSeccomp:\t2\n"), "{state}");
    }
}

fn the_switch_turns_it_off() {
    let volume = Volume::in_home(Home::new(), &[], &["--no-sandbox"]);
    assert_eq!(volume.status()["sandbox_files"], "off");
    let state = fs::read_to_string(format!("/proc/{}/status", volume.status()["pid"])).unwrap();
    assert!(state.contains("\nSeccomp:\t0\n"), "{state}");
}

fn an_ordinary_user_is_held_and_a_signal_still_unmounts() {
    let volume = Volume::in_home(Home::of_nobody(), &[], &[]);
    assert_eq!(volume.status()["sandbox_system_calls"], "on");
    let pid = volume.pid();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    support::eventually("the process is gone", || support::is_dead(pid));
    assert!(!Home::is_mounted(&volume.plain));
}

/// The provider that made the volume had threads; none of them is left when the sandbox closes.
#[cfg(feature = "aws-kms")]
fn a_mount_that_made_its_volume_under_a_kms_is_held() {
    let server = support::kms_server::KmsServer::start();
    let key = format!("aws-kms:{}", server.create_key().arn);
    let mut home = Home::new();
    for (name, value) in server.environment() {
        home.set(name, value);
    }
    home.set("UNRELATED_SECRET", "x");
    fs::create_dir(home.path("plain")).unwrap();
    home.ok(&[&"mount", &"--init", &"--key", &key, &"cipher", &"plain"]);
    let status: serde_json::Value = serde_json::from_str(&home.ok(&[&"status", &"--json", &"plain"])).unwrap();
    assert_eq!((&status["sandbox_network"], &status["sandbox_programs"]), (&"any".into(), &"none".into()));
    if has_landlock() {
        assert!(status["sandbox_files"].as_str().unwrap().starts_with("on (Landlock "), "{status}");
    }
    fs::write(home.path("plain/file"), "content").unwrap();
    let environment = support::text(&fs::read(format!("/proc/{}/environ", status["pid"])).unwrap());
    assert!(environment.contains("AWS_REGION=") && !environment.contains("UNRELATED_SECRET"), "{environment}");
    home.ok(&[&"umount", &"plain"]);
}

/// Becomes the program, with the same arguments; returns only if that fails.
fn run_without_landlock(program: &OsStr) -> io::Error {
    let rules = BTreeMap::from([(libc::SYS_landlock_create_ruleset, Vec::new())]);
    let missing = SeccompAction::Errno(u32::try_from(libc::ENOSYS).unwrap());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, missing, std::env::consts::ARCH.try_into().unwrap());
    let filter: BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter(&filter).unwrap();
    Command::new(program).args(std::env::args_os().skip(1)).exec()
}

fn a_kernel_without_landlock_is_told_and_the_rest_holds() {
    support::needs_root();
    let mut home = Home::new();
    let program = home.program().to_owned();
    home.set(WITHOUT_LANDLOCK, program);
    home.set_program(std::env::current_exe().unwrap());
    let volume = Volume::in_home(home, &[], &[]);
    let status = volume.status();
    assert!(status["sandbox_files"].as_str().unwrap().starts_with("not held: "), "{status}");
    assert_eq!((&status["sandbox_system_calls"], &status["sandbox_programs"]), (&"on".into(), &"none".into()));
    fs::write(volume.path("file"), "content").unwrap();
    let logs = volume.home.logs();
    assert!(logs.contains("WARN") && logs.contains("the sandbox is incomplete: files: not held"), "{logs}");
}
