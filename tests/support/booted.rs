//! A systemd of a test's own: this machine's files under an overlay that forgets, booted in a container, with the program under
//! test and the units that are shipped installed in it.
//!
//! Invariants: nothing of it is seen outside but processes and, by way of [`Booted::path`], its files; the network is this
//! machine's, with no right to change it; when the test ends or dies, all processes of it are gone, and with them its files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// With this variable a machine on which nothing can be booted fails the tests.
const REQUIRED: &str = "KMSFS_TEST_BOOT";
/// How long a boot may take on a busy machine.
const BOOT: Duration = Duration::from_secs(120);
/// How long a command inside may take, in seconds.
const TIMEOUT: &str = "100";
/// How long a unit may take to get into a state.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs in namespaces of its own, as their first process: makes the tree in `$TREE`, which nobody else sees, and boots it.
const MAKE: &str = r#"
set -e
# A mount of others that stayed here would outlive its unmounting.
umount --lazy --all --types fuse.kmsfs,fuse
mount -t tmpfs -o mode=755 none /run
mount -t tmpfs -o mode=755 none "$TREE"
mkdir "$TREE/upper" "$TREE/work" "$TREE/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$TREE/upper,workdir=$TREE/work" "$TREE/root"
cd "$TREE/root"
rm -f etc/machine-id usr/bin/kmsfs
# A name of its own. Without any it would be a first boot, which enables everything.
tr -d - </proc/sys/kernel/random/uuid >etc/machine-id
: >etc/fstab
mkdir -p var/log/journal
# Nothing of what this machine serves or does by the clock runs a second time.
for link in etc/systemd/system/*.wants/* lib/systemd/system/multi-user.target.wants/* etc/rc[35].d/S*; do
    unit=${link##*/}
    case $link in
        etc/rc*) unit=${unit#S[0-9][0-9]}.service ;;
    esac
    case $unit in
        systemd-logind* | systemd-user-sessions* | dbus* | remote-fs.target | getty.target | '*'*) ;;
        *) ln -sfn /dev/null "etc/systemd/system/$unit" ;;
    esac
done
for unit in timers.target systemd-firstboot.service systemd-networkd.service systemd-resolved.service; do
    ln -sfn /dev/null "etc/systemd/system/$unit"
done
eval "$PREPARE"
# A control group of its own, so that several can run.
for hierarchy in /sys/fs/cgroup/systemd /sys/fs/cgroup/unified /sys/fs/cgroup; do
    if [ -w "$hierarchy/cgroup.procs" ]; then
        mkdir "$hierarchy/$NAME"
        echo $$ >"$hierarchy/$NAME/cgroup.procs"
    fi
done
bind="--bind=/dev/fuse"
[ ! -c /dev/autofs ] || bind="$bind --bind=/dev/autofs"
# So it says that the system wants to boot again.
status=133
while [ "$status" = 133 ]; do
    status=0
    systemd-nspawn --quiet --directory="$TREE/root" --machine="$NAME" --register=no --keep-unit --console=pipe \
        --link-journal=no --resolv-conf=off --timezone=off $bind --capability=CAP_IPC_LOCK \
        --system-call-filter='landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret bpf @memlock' --boot || status=$?
done
exit "$status"
"#;

/// A running system.
pub(crate) struct Booted {
    container: Child,
    name: String,
    leader: u32,
    directory: tempfile::TempDir,
}

impl Booted {
    /// Boots one, in whose tree the shell script `prepare` has run before. Nothing, after saying why, where none can be booted.
    pub(crate) fn start(prepare: &str) -> Option<Self> {
        if let Err(why) = can_boot() {
            assert!(std::env::var_os(REQUIRED).is_none(), "{REQUIRED} is set, and {why}");
            println!("left out: {why}");
            return None;
        }
        let mut booted = Self::begin(&format!("{}\n{prepare}", install()));
        booted.wait_for_boot();
        Some(booted)
    }

    fn begin(prepare: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("kmsfs-booted-").tempdir().unwrap();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kmsfs-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let log = fs::File::create(directory.path().join("log")).unwrap();
        fs::create_dir(directory.path().join("tree")).unwrap();
        // The end of this thread is the end of `unshare`, that one that of the namespaces' first process, and so of all in them.
        let container = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "--pid", "--fork"])
            .args(["--kill-child", "--mount-proc", "sh", "-c", MAKE])
            .env("TREE", directory.path().join("tree"))
            .env("UNITS", Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd"))
            .envs([("PREPARE", prepare), ("NAME", &name)])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { container, name, leader: 0, directory }
    }

    /// Shuts it down in order and boots it again.
    pub(crate) fn reboot(&mut self) {
        let before = self.leader;
        self.run("systemctl reboot");
        let until = Instant::now() + BOOT;
        while Path::new("/proc").join(before.to_string()).exists() {
            assert!(Instant::now() < until, "no shutdown: {}", self.console());
            std::thread::sleep(Duration::from_millis(50));
        }
        self.wait_for_boot();
    }

    fn wait_for_boot(&mut self) {
        if let Err(why) = self.comes_up() {
            panic!("{why}");
        }
    }

    /// Waits until it is up, or says why it will not be.
    fn comes_up(&mut self) -> Result<(), String> {
        let until = Instant::now() + BOOT;
        loop {
            self.leader = systemd_below(self.container.id()).unwrap_or(0);
            // The state is no success when a unit of this machine does not like containers; what matters is that all jobs are done.
            if self.leader != 0 && self.is_up() {
                return Ok(());
            }
            let ended = self.container.try_wait().unwrap();
            if ended.is_some() || Instant::now() > until {
                return Err(format!("no boot ({ended:?}): {}", self.console()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn is_up(&self) -> bool {
        let state = self.run("systemctl is-system-running").stdout;
        ["running", "degraded"].contains(&String::from_utf8_lossy(&state).trim())
    }

    fn console(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// A path of its tree, as this process reaches it.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.leader.to_string()).join("root").join(path.trim_start_matches('/'))
    }

    /// Runs a shell script in it.
    pub(crate) fn run(&self, script: &str) -> Output {
        let mut command = Command::new("timeout");
        command.args([
            "--kill-after=5",
            TIMEOUT,
            "nsenter",
            "--all",
            "--target",
            &self.leader.to_string(),
            "sh",
            "-c",
            script,
        ]);
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert_ne!(output.status.code(), Some(124), "it hangs: {script}\n{}", self.console());
        output
    }

    /// Runs a shell script, which must succeed, and returns what it prints.
    pub(crate) fn ok(&self, script: &str) -> String {
        let output = self.run(&format!("set -e\n{script}"));
        let [said, complained] =
            [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        assert!(output.status.success(), "{script}: {}\n{said}{complained}{}", output.status, self.journal(""));
        said
    }

    /// Runs a shell script, which must fail, and returns what it complains of.
    pub(crate) fn fails(&self, script: &str) -> String {
        let output = self.run(script);
        assert!(!output.status.success(), "{script} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// A property of a unit.
    pub(crate) fn property(&self, unit: &str, name: &str) -> String {
        self.ok(&format!("systemctl show --value -p {name} '{unit}'")).trim().to_owned()
    }

    /// Waits until a unit has a property.
    pub(crate) fn wait_for(&self, unit: &str, name: &str, value: &str) {
        let until = Instant::now() + PATIENCE;
        while self.property(unit, name) != value {
            assert!(Instant::now() < until, "{unit} has no {name}={value}: {}", self.journal(""));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the journal has, with these arguments of `journalctl`.
    pub(crate) fn journal(&self, arguments: &str) -> String {
        let output = self.run(&format!("journalctl --sync; journalctl --no-pager --quiet {arguments}"));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        let _ = self.container.kill();
        let _ = self.container.wait();
        for hierarchy in ["systemd", "unified", "."] {
            let group = Path::new("/sys/fs/cgroup").join(hierarchy).join(&self.name);
            let until = Instant::now() + Duration::from_secs(10);
            while group.exists() && !remove_groups(&group) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// The first `systemd` among what the process `pid` has started.
fn systemd_below(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().filter_map(|child| child.parse().ok()).find_map(|child: u32| {
        let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
        if name.trim() == "systemd" { Some(child) } else { systemd_below(child) }
    })
}

/// Removes a control group with those below it; whether all are gone.
fn remove_groups(group: &Path) -> bool {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    fs::remove_dir(group).is_ok()
}

/// Whether a systemd can be booted here, or why not.
fn can_boot() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("only root can boot a systemd".to_owned());
    }
    for (program, package) in [
        ("systemd-nspawn", "systemd-container"),
        ("nsenter", "util-linux"),
        ("setpriv", "util-linux"),
        ("/lib/systemd/systemd", "systemd"),
    ] {
        if Command::new(program).arg("--version").output().is_err() {
            return Err(format!("{program} is not installed (package {package}): .ci/run installs it"));
        }
    }
    if !Path::new("/dev/fuse").exists() {
        return Err("there is no /dev/fuse".to_owned());
    }
    let probe = "mount -t tmpfs none /run && mkdir /run/u /run/w /run/m && \
                 mount -t overlay overlay -o lowerdir=/,upperdir=/run/u,workdir=/run/w /run/m && [ -e /run/m/etc ]";
    let output = Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", probe]).output();
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if !output.status.success() {
        return Err(format!("this machine lets nobody mount an overlay: {complaint}"));
    }
    boots_at_all().clone()
}

/// Boots a system in which nothing of ours is, once for all tests: what a machine does not allow shows there, and is no fault of
/// what is tested.
fn boots_at_all() -> &'static Result<(), String> {
    static BOOTS: OnceLock<Result<(), String>> = OnceLock::new();
    BOOTS.get_or_init(|| {
        let mut plain = Booted::begin(":");
        plain.comes_up().map_err(|why| format!("no systemd boots here even without kmsfs: {why}"))
    })
}

/// Puts the program and the units where `docs/GUIDE.md` says.
fn install() -> String {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd");
    format!(
        "install -m 755 '{program}' usr/bin/kmsfs\nln -sfn ../bin/kmsfs usr/sbin/mount.kmsfs\n\
         cp '{units}/kmsfs@.service' '{units}/kmsfs.target' etc/systemd/system/",
        program = env!("CARGO_BIN_EXE_kmsfs"),
        units = units.display()
    )
}
