//! A volume of a test's own: made, mounted and unmounted with the program under test, in a home of its own.
#![allow(clippy::print_stderr)] // logs of a failed test

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Gid, Uid};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal};

const PROGRAM: &str = env!("CARGO_BIN_EXE_kmsfs");
/// Directories where the tools of a Debian system are, for users who have no PATH of ours.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// No command of a test may take longer, in seconds.
const TIMEOUT: &str = "120";
/// How long the kernel or a process may take to get into a state.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory with everything that a user of the program has, and nothing of the machine's.
pub(crate) struct Home {
    directory: tempfile::TempDir,
    program: PathBuf,
    user: Option<&'static str>,
    variables: BTreeMap<OsString, OsString>,
}

/// An argument of a command.
pub(crate) type Argument<'a> = &'a dyn AsRef<OsStr>;

impl Home {
    /// That of the user who runs the test.
    pub(crate) fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("kmsfs-test-").tempdir().unwrap();
        let mut home = Self { directory, program: PROGRAM.into(), user: None, variables: BTreeMap::new() };
        let places =
            [("HOME", "home"), ("XDG_DATA_HOME", "data"), ("XDG_STATE_HOME", "state"), ("XDG_RUNTIME_DIR", "run")];
        for (variable, place) in places {
            fs::DirBuilder::new().mode(0o700).create(home.path(place)).unwrap();
            home.set(variable, home.path(place));
        }
        home.set("PATH", SYSTEM_PATH);
        home
    }

    /// That of the ordinary user nobody, which only root can make. The program is copied to where he can run it.
    pub(crate) fn of_nobody() -> Self {
        needs_root();
        let mut home = Self::new();
        let (uid, gid) = nobody();
        for place in ["", "home", "data", "state", "run"] {
            rustix::fs::chown(home.path(place), Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).unwrap();
        }
        home.program = home.path("kmsfs");
        fs::copy(PROGRAM, &home.program).unwrap();
        home.user = Some("nobody");
        home
    }

    /// A path in it.
    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file that nobody else can read.
    pub(crate) fn secret(&self, name: &str, content: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        fs::write(self.path(name), content).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// Gives all later commands an environment variable.
    pub(crate) fn set(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) {
        self.variables.insert(name.into(), value.into());
    }

    /// Takes a variable out of the environment again.
    pub(crate) fn unset(&mut self, name: &str) {
        self.variables.remove(std::ffi::OsStr::new(name));
    }

    /// A command of this home's user, which ends in time.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", TIMEOUT]);
        if let Some(user) = self.user {
            command.args(["runuser", "-u", user, "--"]);
        }
        command.arg(program).env_clear().envs(&self.variables).current_dir(self.directory.path()).stdin(Stdio::null());
        command
    }

    /// The program under test.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// From now on runs this in the place of the program under test: something that starts it in its own way.
    pub(crate) fn set_program(&mut self, program: PathBuf) {
        self.program = program;
    }

    /// Runs the program to its end.
    pub(crate) fn kmsfs(&self, arguments: &[Argument<'_>]) -> Output {
        let output = self.command(&self.program).args(arguments).output().expect("coreutils has timeout");
        assert_ne!(output.status.code(), Some(124), "it hangs: {}", shown(arguments));
        output
    }

    /// Runs the program, which must succeed, and returns what it prints.
    pub(crate) fn ok(&self, arguments: &[Argument<'_>]) -> String {
        let output = self.kmsfs(arguments);
        assert!(output.status.success(), "kmsfs {}: {}{}", shown(arguments), output.status, text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs the program, which must end with this exit code and say why in one line; returns what it says.
    pub(crate) fn refused(&self, code: i32, arguments: &[Argument<'_>]) -> String {
        let output = self.kmsfs(arguments);
        let said = text(&output.stderr);
        let what = shown(arguments);
        assert_eq!(output.status.code(), Some(code), "kmsfs {what}: {said}");
        let told = said.lines().filter(|line| line.starts_with("kmsfs: ")).count();
        assert!(told == 1, "kmsfs {what}: {said}");
        said
    }

    /// Runs a shell script, which must succeed, and returns what it prints.
    pub(crate) fn shell(&self, script: &str) -> String {
        let output = self.command("sh").args(["-e", "-c", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}{}", text(&output.stderr), text(&output.stdout));
        text(&output.stdout)
    }

    /// Starts the program with what it prints in files: `NAME.out` and `NAME.err`.
    pub(crate) fn start(&self, name: &str, arguments: &[Argument<'_>]) -> Running {
        let file = |kind: &str| fs::File::create(self.path(format!("{name}.{kind}"))).unwrap();
        // Without `timeout`, so that signals reach the program itself.
        let mut command = Command::new(&self.program);
        command.args(arguments).env_clear().envs(&self.variables).current_dir(self.directory.path());
        Running(command.stdin(Stdio::null()).stdout(file("out")).stderr(file("err")).spawn().unwrap())
    }

    /// All logs of background mounts.
    pub(crate) fn logs(&self) -> String {
        let directory = self.path("state/kmsfs");
        let entries = fs::read_dir(directory).into_iter().flatten().map(|entry| entry.unwrap().path());
        entries
            .filter(|path| path.extension() == Some(OsStr::new("log")))
            .map(|log| text(&fs::read(log).unwrap()))
            .collect()
    }

    /// Whether something is mounted there.
    pub(crate) fn is_mounted(path: &Path) -> bool {
        mounts_below(path).iter().any(|mount| mount == path)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- logs in {}\n{}", self.directory.path().display(), self.logs());
        }
        for mount in mounts_below(self.directory.path()).iter().rev() {
            detach(mount);
        }
    }
}

/// A process that a test started; killed on drop.
pub(crate) struct Running(Child);

impl Running {
    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// Waits for the end and returns the exit code.
    pub(crate) fn end(self) -> Option<i32> {
        self.status().code()
    }

    /// Waits for the end and returns how it ended.
    pub(crate) fn status(mut self) -> ExitStatus {
        let mut status = None;
        eventually("the process ends", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Whether it still runs.
    pub(crate) fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A volume with its mount point; unmounted with its home.
pub(crate) struct Volume {
    pub(crate) home: Home,
    /// The cipher directory.
    pub(crate) cipher: PathBuf,
    /// The mount point.
    pub(crate) plain: PathBuf,
    options: Vec<String>,
}

impl Volume {
    /// A new one with these arguments for `init`, mounted.
    pub(crate) fn new(init: &[&str]) -> Self {
        Self::in_home(Home::new(), init, &[])
    }

    /// The same in a given home, mounted always with these arguments.
    pub(crate) fn in_home(home: Home, init: &[&str], options: &[&str]) -> Self {
        let (cipher, plain) = (home.path("cipher"), home.path("plain"));
        let mut arguments: Vec<Argument<'_>> = vec![&"init", &cipher];
        arguments.extend(init.iter().map(|argument| argument as Argument<'_>));
        home.ok(&arguments);
        let made = home.command("mkdir").arg("-p").arg(&plain).status().unwrap();
        assert!(made.success());
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let volume = Self { home, cipher, plain, options };
        volume.mount();
        volume
    }

    /// The volume that lies in `home` as `cipher` already; it is not mounted.
    pub(crate) fn unpacked(home: Home) -> Self {
        let (cipher, plain) = (home.path("cipher"), home.path("plain"));
        fs::create_dir(&plain).unwrap();
        Self { home, cipher, plain, options: Vec::new() }
    }

    /// A path on the mount.
    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.plain.join(name)
    }

    /// Mounts it.
    pub(crate) fn mount(&self) {
        let said = self.home.ok(&self.mount_arguments());
        assert_eq!(said, "", "success is silent");
        assert!(Home::is_mounted(&self.plain), "mount returned before the mount was there");
    }

    /// The arguments that mount it.
    pub(crate) fn mount_arguments(&self) -> Vec<Argument<'_>> {
        let mut arguments: Vec<Argument<'_>> = vec![&"mount", &self.cipher, &self.plain];
        arguments.extend(self.options.iter().map(|option| option as Argument<'_>));
        arguments
    }

    /// Unmounts it. Another test's process that is just being started may hold a file of ours for a moment.
    pub(crate) fn unmount(&self) {
        eventually("nothing keeps the mount in use", || {
            let output = self.home.kmsfs(&[&"umount", &self.plain]);
            let said = text(&output.stderr);
            assert!(output.status.success() || said.contains("is in use"), "{said}");
            output.status.success()
        });
        assert!(!Home::is_mounted(&self.plain));
    }

    /// Unmounts and mounts it again.
    pub(crate) fn remount(&self) {
        self.unmount();
        self.mount();
    }

    /// What `kmsfs status` says.
    pub(crate) fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.home.ok(&[&"status", &"--json", &self.plain])).unwrap()
    }

    /// The process behind the mount.
    pub(crate) fn pid(&self) -> Pid {
        let pid = self.status()["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        pid.and_then(Pid::from_raw).expect("a pid")
    }

    /// Kills the process behind the mount, and waits until nothing of it is left.
    pub(crate) fn kill(&self) {
        let pid = self.pid();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        eventually("the process is dead", || is_dead(pid));
    }

    /// The ciphertext behind a file or directory on the mount, which has the same inode number.
    pub(crate) fn behind(&self, name: impl AsRef<Path>) -> PathBuf {
        let inode = fs::symlink_metadata(self.path(name)).unwrap().ino();
        let same = |path: &PathBuf| fs::symlink_metadata(path).unwrap().ino() == inode;
        walk(&self.cipher).into_iter().find(same).expect("a backing file")
    }
}

/// Whether all threads of a process have ended; one whose parent has not asked for it yet counts.
pub(crate) fn is_dead(pid: Pid) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())) else { return true };
    let states = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
    let states: Vec<String> = states.collect();
    states.iter().all(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')))
}

/// What lies at a path, as far as programs can see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    /// Seconds and nanoseconds.
    pub(crate) modified: (i64, i64),
    /// Of anything but directories.
    pub(crate) links: u64,
    /// Content or target; nothing for other kinds.
    pub(crate) content: Vec<u8>,
}

/// Everything below a directory, by relative path.
pub(crate) fn tree(root: &Path) -> BTreeMap<PathBuf, Entry> {
    walk(root).into_iter().map(|path| (path.strip_prefix(root).unwrap().to_owned(), entry(&path))).collect()
}

fn entry(path: &Path) -> Entry {
    let found = fs::symlink_metadata(path).unwrap();
    let content = match found.file_type() {
        kind if kind.is_file() => fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        kind if kind.is_symlink() => fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec(),
        _ => Vec::new(),
    };
    if found.is_file() {
        assert_eq!(found.len(), content.len() as u64, "the size of {}", path.display());
    }
    let links = if found.is_dir() { 0 } else { found.nlink() };
    let modified = (found.mtime(), found.mtime_nsec());
    Entry { mode: found.mode(), owner: (found.uid(), found.gid()), modified, links, content }
}

/// Fails with the names of what differs, and not with all the bytes.
pub(crate) fn assert_same(what: &str, left: &BTreeMap<PathBuf, Entry>, right: &BTreeMap<PathBuf, Entry>) {
    let names = left.keys().chain(right.keys()).collect::<std::collections::BTreeSet<_>>();
    let brief = |entry: Option<&Entry>| entry.map(|entry| Entry { content: Vec::new(), ..entry.clone() });
    let differ = names.into_iter().filter(|name| left.get(*name) != right.get(*name));
    let report: Vec<String> = differ
        .map(|name| {
            let [l, r] = [left.get(name), right.get(name)];
            let at = match (l, r) {
                (Some(l), Some(r)) => l.content.iter().zip(&r.content).position(|(a, b)| a != b),
                _ => None,
            };
            let lengths = [l, r].map(|side| side.map(|entry| entry.content.len()));
            format!("{name:?}: {:?} and {:?}, {lengths:?} bytes, first difference {at:?}", brief(l), brief(r))
        })
        .collect();
    assert!(report.is_empty(), "{what}: {}", report.join("\n"));
}

/// All paths below a directory, without it.
pub(crate) fn walk(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                waiting.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "not in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Bytes without a pattern that two pages could share.
pub(crate) fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    });
    next.take(len).collect()
}

/// Changes one byte of a file.
pub(crate) fn flip(path: &Path, offset: u64) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

/// Sets access and modification time.
pub(crate) fn set_times(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// The errno of a failure.
pub(crate) fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// Runs a program of the system, which must succeed, and returns what it prints.
pub(crate) fn run(program: &str, arguments: &[Argument<'_>], directory: &Path) -> String {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(directory).stdin(Stdio::null());
    // What the one who runs the tests has set for his own work.
    ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "MAKEFLAGS", "CFLAGS"]
        .iter()
        .for_each(|name| _ = command.env_remove(name));
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").env("LC_ALL", "C");
    let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}: .ci/run installs it"));
    let said = [text(&output.stdout), text(&output.stderr)].concat();
    assert!(output.status.success(), "{program} {}: {}\n{said}", shown(arguments), output.status);
    said
}

/// Runs a Python program, which must succeed.
pub(crate) fn python(script: &str, arguments: &[Argument<'_>], directory: &Path) -> String {
    let mut all: Vec<Argument<'_>> = vec![&"-c", &script];
    all.extend(arguments);
    run("python3", &all, directory)
}

/// Some tests take the parts of several users.
pub(crate) fn needs_root() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root, as .ci/run has");
}

/// The ids of the user nobody. Makes sure that he may mount.
pub(crate) fn nobody() -> (u32, u32) {
    let id = |flag: &str| run("id", &[&flag, &"nobody"], Path::new("/")).trim().parse().unwrap();
    let device = Path::new("/dev/fuse");
    if fs::metadata(device).is_ok_and(|found| found.mode() & 0o006 != 0o006) {
        fs::set_permissions(device, fs::Permissions::from_mode(0o666)).unwrap();
    }
    (id("-u"), id("-g"))
}

/// Output as text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn shown(arguments: &[Argument<'_>]) -> String {
    let words: Vec<_> = arguments.iter().map(|argument| argument.as_ref().to_string_lossy().into_owned()).collect();
    words.join(" ")
}

/// Mount points at or below a path that has no special characters, in the order in which they were mounted.
fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.starts_with(path)).collect()
}

fn detach(mount: &Path) {
    if rustix::process::geteuid().is_root() {
        let _ = rustix::mount::unmount(mount, UnmountFlags::DETACH);
    } else {
        let _ = Command::new("fusermount3").args(["-uz".as_ref(), mount.as_os_str()]).status();
    }
}
