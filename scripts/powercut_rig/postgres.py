"""PostgreSQL on the mount: a cluster that commits row after row, and the recovery after the cut."""

import os
import shutil
import subprocess
import tempfile
import time
from glob import glob
from pathlib import Path

from .model import LOST, UNOPENABLE

USER = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
STARTS_WITHIN = 90


def program(name):
    found = sorted(glob(f"/usr/lib/postgresql/*/bin/{name}"))
    if not found:
        raise FileNotFoundError("PostgreSQL is not installed (Debian: postgresql)")
    return found[-1]


def template(work):
    """A fresh cluster outside of the disk, made once."""
    path = Path(work) / "cluster"
    if not path.exists():
        path.mkdir(mode=0o700)
        shutil.chown(path, "postgres", "postgres")
        command = [*USER, program("initdb"), "-N", "-A", "trust", "--no-locale", "-E", "UTF8", "--wal-segsize=1", "-D", path]
        subprocess.run([str(word) for word in command], check=True, **QUIET)
    return path


class Cluster:
    def __init__(self, data):
        self.sockets = tempfile.mkdtemp(prefix="pg-", dir=os.path.dirname(os.environ["POWERCUT_CLUSTER"]))
        shutil.chown(self.sockets, "postgres", "postgres")
        options = ["-D", data, "-k", self.sockets, "-c", "listen_addresses=", "-c", "shared_buffers=16MB", "-c", "max_wal_size=16MB"]
        self.server = subprocess.Popen([str(word) for word in [*USER, program("postgres"), *options]], **QUIET)

    def query(self, text):
        """What a query answers, or `None` if the server does not."""
        command = [*USER, program("psql"), "-h", self.sockets, "-d", "postgres", "-X", "-q", "-A", "-t", "-c", text]
        done = subprocess.run(command, text=True, capture_output=True, timeout=STARTS_WITHIN, check=False, cwd="/")
        return done.stdout.strip() if done.returncode == 0 else None

    def wait(self):
        """Until it answers; whether it does."""
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline and self.server.poll() is None:
            if self.query("SELECT 1") == "1":
                return True
            time.sleep(0.1)
        return False

    def session(self):
        command = [*USER, program("psql"), "-h", self.sockets, "-d", "postgres", "-X", "-A", "-t"]
        return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=1,
                                cwd="/")

    def stop(self):
        self.server.kill()
        self.server.wait(30)
        shutil.rmtree(self.sockets, ignore_errors=True)


def postgres(actor):
    """One transaction a row, each acknowledged when the server has said that it is committed."""
    data = os.path.join(actor.root.path, "data")
    subprocess.run(["cp", "-a", os.environ["POWERCUT_CLUSTER"], data], check=True)
    os.chmod(actor.root.path, 0o755)
    actor.sync_everything()
    cluster = Cluster(data)
    if not cluster.wait():
        raise RuntimeError("PostgreSQL does not start")
    if cluster.query("CREATE TABLE rows (n INTEGER PRIMARY KEY, t TEXT)") is None or cluster.query("CHECKPOINT") is None:
        raise RuntimeError("PostgreSQL makes no table")
    if actor.journal.liar:
        cluster.query("ALTER SYSTEM SET fsync = off")
        cluster.query("SELECT pg_reload_conf()")
    session = cluster.session()
    actor.note("sql", "postgres", 0, "ack")
    actor.note("pid", cluster.server.pid)
    count = 0
    while True:
        count += 1
        actor.note("sql", "postgres", count, "begin")
        print(f"INSERT INTO rows VALUES ({count}, repeat(md5('{count}'), 1 + {count} % 50));", file=session.stdin, flush=True)
        if session.stdout.readline().strip() != "INSERT 0 1":
            raise RuntimeError("an INSERT failed")
        actor.note("sql", "postgres", count, "ack")
        yield


def faults(path, commits):
    """What is wrong with the cluster after recovery."""
    begun, acknowledged = commits.get("postgres", (0, -1))
    if acknowledged < 0:
        return []
    data = os.path.join(path, "data")
    Path(data, "postmaster.pid").unlink(missing_ok=True)
    cluster = Cluster(data)
    try:
        if not cluster.wait():
            return [(UNOPENABLE, data, "PostgreSQL does not start")]
        good = "t = repeat(md5(n::text), 1 + n % 50)"
        answer = cluster.query(f"SELECT count(*), coalesce(max(n), 0), coalesce(bool_and({good}), true) FROM rows")
        if answer is None:
            return [(UNOPENABLE, data, "PostgreSQL does not read its table")]
        count, last, right = answer.split("|")
        if right != "t" or count != last or not acknowledged <= int(count) <= max(begun, acknowledged):
            return [(LOST, data, f"{count} rows up to {last}, good: {right}; {acknowledged} were committed")]
        return []
    finally:
        cluster.stop()
