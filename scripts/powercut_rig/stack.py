"""A filesystem on a forgetting disk, and what is mounted over it: nothing (native), kmsfs or gocryptfs."""

import ctypes
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from .disk import Disk

MIB = 1 << 20
FORMAT = {
    "ext4": (256, "mkfs.ext4 -q -F -b 4096 -E nodiscard,lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": (320, "mkfs.xfs -q -K -f"),
    "btrfs": (320, "mkfs.btrfs -q -K -f"),
}
CHECKERS = {"ext4": "e2fsck -fn", "xfs": "xfs_repair -n", "btrfs": "btrfs check --readonly"}
PEERS = ("native", "kmsfs", "gocryptfs")


class RigError(Exception):
    """The rig itself does not work: nothing is said about the peer."""


def run(command, **options):
    words = command.split() if isinstance(command, str) else [str(word) for word in command]
    done = subprocess.run(words, text=True, capture_output=True, timeout=120, check=False, **options)
    if done.returncode:
        raise RigError(f"{' '.join(words)}: {done.stdout} {done.stderr}".strip())
    return done.stdout.strip()


def wait_for(what, condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RigError(f"{what} takes longer than {seconds} seconds")
        time.sleep(0.01)


class Stack:
    """`plain` is where programs work, `backing` the filesystem on the disk. `end` is the rule of kmsfs volumes for files that were cut
    off; with `kms` they are under keys of a KMS that is reached over the network, and not of a keyring."""

    def __init__(self, work, filesystem, peer, program, end="lenient", kms=False):
        self.work, self.filesystem, self.peer, self.program, self.end = Path(work), filesystem, peer, program, end
        self.backing, self.cipher = self.work / "backing", self.work / "backing" / "cipher"
        self.plain = self.cipher if peer == "native" else self.work / "plain"
        for path in (self.backing, self.work / "plain"):
            path.mkdir(parents=True)
        (self.work / "passphrase").write_text("not a secret\n", encoding="utf-8")
        self.environment = os.environ | {
            name: str(self.work / "home") for name in ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "HOME")
        }
        (self.work / "home").mkdir(mode=0o700)
        self.kms, self.keys, self.key = None, [], None
        self.log = open(self.work / "daemon.log", "ab")
        if kms:
            self.start_kms()
        self.disk = Disk(FORMAT[filesystem][0] * MIB, str(self.work / "disk"))
        self.daemon = None

    def start_kms(self):
        """The tests' own KMS, which outlives every power cut as a real one does."""
        server = Path(os.environ.get("KMSFS_KMS_SERVER", Path(self.program).parent / "examples" / "kms_server"))
        if not server.exists():
            raise RigError(f"{server} is missing: build it with `cargo build --release --example kms_server`")
        command = [str(server), "--keys", "2", "--latency-ms", "2"]
        self.kms = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
        told = json.loads(self.kms.stdout.readline())
        self.keys = [f"aws-kms:{key}" for key in told["keys"]]
        self.environment |= {
            "KMSFS_ENDPOINT_URL": told["endpoint"], "AWS_REGION": told["region"], "AWS_ACCESS_KEY_ID": told["access_key_id"],
            "AWS_SECRET_ACCESS_KEY": told["secret_access_key"], "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
            "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def fresh_key(self):
        """Another wrapping key than the volume's; a keyring lies on the disk that is cut."""
        if self.kms:
            return next(key for key in self.keys if key != self.key)
        return f"local:{self.backing / f'keyring-{time.monotonic_ns()}'}"

    def kmsfs(self, *words):
        """Runs a command of kmsfs to its end: exit code, what it printed, its errors."""
        command = [str(word) for word in (self.program, *words)]
        done = subprocess.run(command, env=self.environment, stdin=subprocess.DEVNULL, text=True, capture_output=True, timeout=120, check=False)
        return done.returncode, done.stdout, done.stderr

    def rewrap_command(self, key):
        """Begins to bring the volume under another key and does not wait for it."""
        command = [self.program, "rewrap", self.cipher, "--to", key, "--parallel", "2"]
        return subprocess.Popen([str(word) for word in command], env=self.environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def recipients(self):
        """The keys that wrap what is new, as `recipients list` names them."""
        code, out, _ = self.kmsfs("recipients", "list", self.cipher, "--json")
        return [] if code else [key["key"] for key in json.loads(out) if key["recipient"]]

    def files_by_key(self):
        """How many files have a record of each key."""
        code, out, err = self.kmsfs("keys", "list", self.cipher, "--files", "--json")
        if code:
            raise OSError(f"keys list: {err}")
        return {key["key"]: key["files"] for key in json.loads(out)["keys"]}

    def check_volume(self, salvage):
        """What `kmsfs check` finds that is worse than amiss; `salvage` is a new directory for what opens of it."""
        code, out, err = self.kmsfs("check", self.cipher, "--json", "--salvage", salvage)
        if code not in (0, 13, 14, 15) or not out:
            raise OSError(f"kmsfs check ends with {code}: {err}")
        findings = json.loads(out)["findings"]
        return [finding for finding in findings if finding["severity"] != "amiss"]

    def attach(self):
        for _ in range(20):
            try:
                return run(["losetup", "-f", "--show", "--direct-io=on", self.disk.path])
            except RigError as error:  # another process took the device that was free
                failure = error
                time.sleep(0.1)
        raise failure

    def format(self):
        loop = self.attach()
        try:
            run(f"{FORMAT[self.filesystem][1]} {loop}")
        finally:
            run(["losetup", "-d", loop])
        self.mount_backing()
        self.cipher.mkdir()
        os.chmod(self.backing, 0o755)
        if self.peer == "kmsfs":
            self.key = self.keys[0] if self.kms else self.fresh_key()
            run([self.program, "init", "--key", self.key, "--end", self.end, self.cipher], env=self.environment)
        elif self.peer == "gocryptfs":
            run(["gocryptfs", "-init", "-q", "-scryptn", "10", "-passfile", self.work / "passphrase", self.cipher])
        run(["sync", "-f", self.backing])

    def mount_backing(self, options="noatime"):
        loop = self.attach()
        try:
            run(["mount", "-o", options, loop, self.backing])
        finally:
            run(["losetup", "-d", loop])  # the kernel lets go of it with the last user

    def mount(self):
        """Starts what lies over the backing filesystem."""
        if self.peer == "native":
            return
        command = {
            "kmsfs": [self.program, "mount", "-f", "-o", "allow_other", self.cipher, self.plain],
            "gocryptfs": ["gocryptfs", "-fg", "-q", "-allow_other", "-passfile", self.work / "passphrase", self.cipher, self.plain],
        }[self.peer]
        self.daemon = subprocess.Popen(
            [str(word) for word in command], env=self.environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )
        wait_for("mount", lambda: os.path.ismount(self.plain) or self.daemon.poll() is not None)
        if self.daemon.poll() is not None:
            raise OSError(f"{self.peer} does not mount: {self.log_tail()}")

    def log_tail(self):
        return (self.work / "daemon.log").read_text(encoding="utf-8", errors="replace")[-1500:]

    def unmount_command(self):
        """Begins an orderly unmount and does not wait for it."""
        command = [self.program, "umount", self.plain] if self.peer == "kmsfs" else ["umount", self.plain]
        return subprocess.Popen([str(word) for word in command], env=self.environment, stdout=self.log, stderr=self.log)

    def kill(self):
        """Ends the daemon as a power cut does."""
        if self.daemon is not None:
            self.daemon.send_signal(signal.SIGKILL)
            self.daemon.wait(30)
            self.daemon = None
        if self.peer != "native":
            detach(self.plain)

    def leave(self):
        """Unmounts in order."""
        if self.daemon is not None:
            unmounting = self.unmount_command()
            unmounting.wait(60)
            self.daemon.wait(60)
            self.daemon = None

    def unmount_backing(self):
        def gone():
            done = subprocess.run(["umount", self.backing], capture_output=True, check=False)
            return done.returncode == 0 or not os.path.ismount(self.backing)

        wait_for("unmounting the backing filesystem", gone)
        wait_for("releasing the loop device", lambda: not run(["losetup", "-j", self.disk.path]))

    def check_backing(self):
        """What the filesystem's own checker says; the empty text if nothing."""
        loop = self.attach()
        try:
            run(f"{CHECKERS[self.filesystem]} {loop}")
            return ""
        except RigError as error:
            return str(error)
        finally:
            run(["losetup", "-d", loop])

    def close(self):
        self.kill()
        if self.kms:
            self.kms.kill()
            self.kms.wait(30)
        detach(self.backing)
        self.disk.close()
        self.log.close()


def detach(path):
    """Unmounts without waiting."""
    ctypes.CDLL(None).umount2(os.fsencode(str(path)), 2)
