"""One rig: one filesystem and one peer, cut after cut. Each cut's files stay for the next one, which must leave them alone."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from . import postgres, workload
from .actor import PAYLOAD, data_of
from .keys import KeyChanger
from .model import LOST, UNOPENABLE, Check, Model
from .stack import RigError, Stack, run, wait_for

WORKLOAD = [sys.executable, "-B", workload.__file__]
CUTS_PER_FILESYSTEM = 12
CHECK_WITHIN = 120
FILES_IN_STOCK = 150
SETTLES_AFTER = 11  # seconds that kmsfs leaves a file alone before its size settles, and some more


class Rig:
    def __init__(self, filesystem, peer, options):
        self.filesystem, self.peer, self.options = filesystem, peer, options
        self.work = Path(tempfile.mkdtemp(prefix=f"powercut-{filesystem}-{peer}-"))
        self.stack = Stack(self.work, filesystem, peer, options.program, options.end, options.kms)
        if "postgres" in options.kinds:
            os.chmod(self.work, 0o711)
            os.environ["POWERCUT_CLUSTER"] = str(postgres.template(self.work))
        self.at_rest, self.zero_ends, self.refused, self.mixed, self.next_key = {}, set(), 0, False, None
        self.changes, self.stops = 0, []
        self.down = True

    def cuts(self):
        """Yields a result for each cut: seed, kinds, description, faults, acknowledgements."""
        end = time.monotonic() + 60 * self.options.minutes
        try:
            for number in range(self.options.cuts):
                if time.monotonic() > end:
                    break
                seed = f"{self.options.seed}/{self.filesystem}/{number}"
                if number % CUTS_PER_FILESYSTEM == 0:
                    self.begin()
                yield self.cut(number, seed)
        finally:
            self.stack.close()
            if not self.options.keep:
                shutil.rmtree(self.work, ignore_errors=True)

    def begin(self):
        if not self.down:
            self.stack.leave()
            self.stack.unmount_backing()
            trouble = self.stack.check_backing()
            if trouble:
                raise RigError(f"the backing filesystem is damaged: {trouble}")
        if self.options.deaf_disk:
            self.stack.disk.tell("flushing", True)
        self.stack.format()
        self.stack.mount()
        self.at_rest, self.down = {}, False
        if self.options.rewrap:
            self.stock()

    def stock(self):
        """Enough files that rewriting their headers takes a while."""
        top = self.stack.plain / "stock"
        for number in range(FILES_IN_STOCK):
            place = top / f"directory-{number % 7}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"file-{number}").write_bytes(data_of(number, 1 + 97 * number % 9000))
        run(["sync", "-f", self.stack.plain])
        run(["sync", "-f", self.stack.backing])
        self.at_rest["stock"] = digest(top)

    def cut(self, number, seed):
        rng, stack = random.Random(seed), self.stack
        kinds = self.options.kinds
        kinds = rng.sample(kinds, min(len(kinds), rng.choice((1, 1, 2, 3, 4, len(kinds)))))
        name = f"run-{number}"
        for kind in kinds:
            (stack.plain / name / kind).mkdir(parents=True)
        run(["sync", "-f", stack.plain])
        run(["sync", "-f", stack.backing])
        if self.options.deaf_disk:
            stack.disk.tell("flushing", False)
        journal = self.work / f"journal-{number}"
        self.changes, self.stops = 0, []
        cut_at, how = self.work_until_cut(rng, stack.plain / name, kinds, journal)
        stack.kill()
        stack.unmount_backing()
        survived = stack.disk.ask("power on", seed, "on")
        image = self.work / f"image-{number}"
        if self.options.keep:
            stack.disk.ask("save", str(image), "saved")
        model = Model(kinds)
        model.replay(journal, cut_at)
        faults = self.check(rng, model, name, kinds)
        if self.options.keep and not faults:
            image.unlink()
            journal.unlink()
        elif not self.options.keep:
            journal.unlink()
        return {
            "seed": seed, "kinds": kinds, "how": f"{how}; {survived}", "faults": faults, "acknowledged": model.acknowledgements,
            "stopped": model.stopped + self.stops, "changes": self.changes, "zero ends": self.zero_ends, "refused": self.refused,
            "mixed": self.mixed,
        }

    def work_until_cut(self, rng, root, kinds, journal):
        stack = self.stack
        settings = {
            "journal": str(journal), "root": str(root), "backing": str(stack.backing), "kinds": kinds, "seed": rng.random(),
            "liar": self.options.liar, "disturb": rng.choice(("no", "no", "sync", "write", "both")), "pace": rng.choice((0, 0, 0.01, 0.05)),
        }
        before = stack.disk.ask("counts", None, "counts")
        worker = subprocess.Popen([*WORKLOAD, json.dumps(settings)], stdin=subprocess.DEVNULL)
        ready = '"sql"' if "postgres" in kinds else "["
        unmounting = changer = None
        try:
            how = "rewrap" if self.options.rewrap else rng.choice(("work", "work", "work", "work", "work", "work", "unmount", "settle"))
            wait_for("the workload", lambda: said(journal, ready) or worker.poll() is not None, 120)
            if self.options.change_keys:
                changer = KeyChanger(stack, rng.random())
                changer.start()
            time.sleep(0.05 + rng.expovariate(0.5 if changer else 2.5))
            if how == "settle" and rng.random() < 0.3 or how in ("unmount", "rewrap"):
                worker.kill()
                worker.wait(30)
            if how == "unmount" and self.peer != "native":
                unmounting = stack.unmount_command()
            if how == "settle" and self.peer == "kmsfs":
                time.sleep(rng.uniform(4, SETTLES_AFTER))
            if how == "rewrap":
                stack.leave()
                self.next_key = stack.fresh_key()
                # Up to the last of the header pages that it writes, and some more.
                stack.disk.tell("arm", rng.choice((rng.randrange(10), rng.randrange(60), rng.randrange(2 * FILES_IN_STOCK))))
                unmounting = stack.rewrap_command(self.next_key)
                cut_at = self.rewrap_until_cut(unmounting)
                how += " that was over" if cut_at is None else ""
            else:
                stack.disk.tell("arm", rng.choice((0, 1, 2, 3, rng.randrange(10), rng.randrange(60))))
                cut_at = stack.disk.expect("cut", 0.7)
            if cut_at is None:
                stack.disk.tell("cut")
                cut_at = stack.disk.expect("cut", 30)
        finally:
            if changer is not None:
                changer.stop()
                self.changes += changer.done
                self.stops += changer.failures
            worker.kill()
            worker.wait(30)
            end_server(journal)
            if unmounting is not None:
                unmounting.wait(60)
        writes, flushes, pending = (now - then for now, then in zip(stack.disk.ask("counts", None, "counts"), before))
        return cut_at, f"cut in {how} after {writes} writes and {flushes} flushes"

    def rewrap_until_cut(self, rewrap):
        """Ends it once the power is gone, and returns when that was; `None` if it came to its end."""
        deadline, cut_at = time.monotonic() + CHECK_WITHIN, None
        while cut_at is None and rewrap.poll() is None and time.monotonic() < deadline:
            cut_at = self.stack.disk.expect("cut", 0.002)
        code = rewrap.poll()
        rewrap.kill()
        if code or code is None and cut_at is None:
            raise RigError(f"kmsfs rewrap ends with {code}: {self.stack.log_tail()}")
        return cut_at

    def check(self, rng, model, name, kinds):
        stack = self.stack
        self.refused, self.mixed = 0, False
        commit = ",commit=1" if self.filesystem != "xfs" and rng.random() < 0.4 else ""
        try:
            stack.mount_backing(f"noatime{commit}")
        except RigError as error:
            raise RigError(f"the backing filesystem does not mount after the cut: {error}") from error
        salvage = self.work / "salvage"
        shutil.rmtree(salvage, ignore_errors=True)
        try:
            if self.options.change_keys:  # a mount finishes what was half way to a new data key
                stack.mount()
                stack.leave()
            refused, faults = self.check_volume(name, kinds, salvage) if self.peer == "kmsfs" else ({}, [])
            self.mixed = self.next_key is not None and sum(count > 0 for count in stack.files_by_key().values()) > 1
            stack.mount()
        except OSError as error:
            self.begin_anew()
            return [(kind, UNOPENABLE, "/", str(error)) for kind in kinds]
        self.refused = len(refused)
        check = Check(model, stack.plain / name, PAYLOAD if self.peer == "kmsfs" else 1, postgres.faults, refused, salvage)
        # A daemon that hangs is ended, and what is not read yet does not open.
        watchdog = threading.Timer(CHECK_WITHIN, stack.daemon.kill if stack.daemon else lambda: None)
        watchdog.start()
        try:
            faults += check.run(kinds)
        finally:
            watchdog.cancel()
        self.zero_ends = check.zero_ends
        if self.peer == "kmsfs" and not faults:
            faults = self.unreadable_names(kinds)
        for path in refused:  # somebody would restore these
            os.unlink(path)
        faults += self.rested()
        if self.options.change_keys and not faults and rng.random() < 0.3:
            faults = self.finish_changes()
        if self.next_key and not faults:
            faults = self.finish_rewrap()
        run(["sync", "-f", stack.plain])
        run(["sync", "-f", stack.backing])
        if faults:
            self.begin_anew()
        else:
            self.at_rest[name] = digest(stack.plain / name)
        if "postgres" in kinds and not faults:  # a cluster that has run is not at rest
            shutil.rmtree(stack.plain / name)
            del self.at_rest[name]
        return faults

    def check_volume(self, name, kinds, salvage):
        """What `kmsfs check` refuses and may refuse, as the rule `strict` has it: paths on the mount, with what was salvaged of each. And
        all else that it finds. After an orderly unmount everything is durable, and nothing may be refused."""
        refused, faults = {}, []
        for finding in self.stack.check_volume(salvage):
            plain = finding["plain"]
            if self.options.end == "strict" and not self.options.rewrap and plain and plain.startswith(f"{name}/") and finding["kind"] in ("end-mark", "no-header"):
                refused[str(self.stack.plain / plain)] = salvage / "files" / plain
            else:
                faults.append((kinds[0], UNOPENABLE, plain or finding["cipher"], f"check: {finding['what']}"))
        return refused, faults

    def finish_rewrap(self):
        """Goes on with a rewrap that was cut, takes the old key away, and compares everything at rest."""
        stack, key = self.stack, self.next_key
        stack.leave()
        code, _, err = stack.kmsfs("rewrap", stack.cipher, "--to", key)
        if code:
            return [("rewrap", UNOPENABLE, "/", f"it does not go on: {code}: {err}")]
        left = {name: files for name, files in stack.files_by_key().items() if files}
        if len(left) != 1:
            return [("rewrap", LOST, "/", f"files are under {left}")]
        if stack.kms is None:
            Path(stack.key.removeprefix("local:")).unlink()
        stack.key, self.next_key = key, None
        salvage = self.work / "salvage-2"
        shutil.rmtree(salvage, ignore_errors=True)
        faults = [("rewrap", UNOPENABLE, finding["plain"], finding["what"]) for finding in stack.check_volume(salvage)]
        stack.mount()
        return faults + self.rested(keep=True)

    def finish_changes(self):
        """Brings every file under the keys that the volume has after the cut, and compares everything at rest."""
        stack = self.stack
        stack.leave()
        code, _, err = stack.kmsfs("rewrap", stack.cipher)
        if code:
            return [("keys", UNOPENABLE, "/", f"rewrap ends with {code}: {err}")]
        salvage = self.work / "salvage-2"
        shutil.rmtree(salvage, ignore_errors=True)
        faults = [("keys", UNOPENABLE, finding["plain"], finding["what"]) for finding in stack.check_volume(salvage)]
        stack.mount()
        return faults + self.rested(keep=True)

    def begin_anew(self):
        """What was damaged once is not counted again."""
        self.stack.kill()
        self.stack.unmount_backing()
        self.down, self.next_key = True, None
        self.begin()

    def unreadable_names(self, kinds):
        """Entries of the cipher directory that no name of the mount stands for."""
        below = [path for _, path in walk(self.stack.cipher) if not path.name.startswith(".") and not path.name.endswith(".n")]
        below = [path for path in below if ".kmsfs" not in path.parts]
        above = [path for directory, below_it, files in os.walk(self.stack.plain) for path in below_it + files]
        if len(below) == len(above):
            return []
        return [(kinds[0], UNOPENABLE, str(self.stack.cipher), f"{len(below)} entries below, {len(above)} above")]

    def rested(self, keep=False):
        """Files that nobody has touched since an earlier cut are as they were; the oldest go, unless all are kept."""
        faults = []
        for name, expected in self.at_rest.items():
            try:
                if digest(self.stack.plain / name) != expected:
                    faults.append(("at rest", LOST, name, "changed"))
            except OSError as error:
                faults.append(("at rest", UNOPENABLE, name, str(error)))
        runs = [name for name in self.at_rest if name != "stock"]
        for oldest in [] if faults or keep else runs[:-1]:
            del self.at_rest[oldest]
            try:
                shutil.rmtree(self.stack.plain / oldest)
            except OSError as error:
                faults.append(("at rest", UNOPENABLE, oldest, f"cannot be removed: {error}"))
        return faults


def said(journal, word):
    return journal.exists() and word in journal.read_text(encoding="utf-8")


def end_server(journal):
    """Kills the server that the workload started; its children notice."""
    if said(journal, '"pid"'):
        with contextlib.suppress(ProcessLookupError):
            lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
            os.kill(next(line[2] for line in lines if line[1] == "pid"), signal.SIGKILL)


def walk(root):
    """Everything below a directory, errors included."""
    def fail(error):
        raise error

    for directory, directories, files in os.walk(root, onerror=fail):
        for name in directories + files:
            yield name, Path(directory) / name


def digest(root):
    total = hashlib.sha256()
    for _, path in sorted(walk(root)):
        total.update(str(path.relative_to(root)).encode())
        if path.is_symlink():
            total.update(os.readlink(path).encode())
        elif path.is_file():
            total.update(path.read_bytes())
    return total.hexdigest()
