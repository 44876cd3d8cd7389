"""What may be on a mount after a power cut, worked out from the journal of the workload, and the comparison with what is there.

* content: every byte is that of the last acknowledged version or of one begun since, or zero where one of them ended before it;
* sizes lie between the smallest and the largest of those versions (kmsfs rounds up to a page what was not synced);
* a name is bound as it was when last acknowledged, or as something begun since bound it; what moved is under one of its names;
* whatever is there opens: directories list and take entries, files read, links have their target;
* with `end = "strict"`, a file that was cut off in an extension that nobody had synced is refused; what `kmsfs check --salvage` copies
  of it is held against the same."""

import errno
import json
import os
import shutil
import sqlite3
import stat
import tempfile
from pathlib import Path

from .actor import data_of

LOST, UNOPENABLE, UNDONE = "lost", "unopenable", "undone"


class Content:
    def __init__(self):
        self.versions, self.acknowledged = [b""], False

    def change(self, make):
        self.versions.append(make(bytearray(self.versions[-1])))

    def undo(self):
        self.versions.pop()

    def acknowledge(self):
        self.versions, self.acknowledged = self.versions[-1:], True

    def may_be_cut_off(self):
        """Whether a power cut may leave less than all of it: it was never synced, or has grown since."""
        sizes = [len(version) for version in self.versions]
        return not self.acknowledged or any(new > old for old, new in zip(sizes, sizes[1:]))

    def fault(self, found, unit):
        """What is wrong with `found`, or `None`. What was not synced may end in zeros up to a multiple of `unit` bytes."""
        sizes = [len(version) for version in self.versions]
        most = -(-max(sizes) // unit) * unit if len(sizes) > 1 else sizes[0]
        if not min(sizes) <= len(found) <= most:
            return f"{len(found)} bytes, not {min(sizes)} to {max(sizes)}"
        step = 512
        for start in range(0, len(found), step):
            piece = found[start : start + step]
            candidates = [bytes(version[start : start + step]) for version in self.versions]
            if piece in candidates:
                continue
            for i, byte in enumerate(piece):
                allowed = {candidate[i] if i < len(candidate) else 0 for candidate in candidates}
                if byte not in allowed:
                    return f"byte {start + i} of {len(found)} is {byte}, not one of {sorted(allowed)}"
        return None


    def ends_in_zeros(self, found):
        """Whether the end of `found` is zeros that nobody wrote: an extension whose size is durable and whose content is not."""
        last = len(found) - 1
        return last >= 0 and found[last] == 0 and all(version[last] for version in self.versions if len(version) > last)


class Object:
    def __init__(self, kind, target):
        self.kind, self.target = kind, target
        self.content, self.attributes, self.entries = Content(), {}, {}
        self.anchored, self.found = False, False


def write(offset, length, seed):
    def make(content):
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + length] = data_of(seed, length)
        return content

    return make


def resize(size):
    return lambda content: content[:size] + bytes(max(0, size - len(content)))


def zero(offset, length):
    def make(content):
        end = min(len(content), offset + length)
        content[offset:end] = bytes(max(0, end - offset))
        return content

    return make


class Model:
    """The objects of one run, from the events of its journal before the cut."""

    def __init__(self, kinds):
        self.objects = {kind: Object("dir", None) for kind in kinds}
        self.kind_of = {kind: kind for kind in kinds}
        self.commits, self.stopped, self.acknowledgements = {}, [], 0

    def replay(self, path, cut_at):
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                moment, what, *rest = json.loads(line)
                if moment < cut_at:
                    getattr(self, f"on_{what}")(*rest)

    def on_new(self, ident, kind, target):
        self.objects[ident] = Object(kind, target)
        self.kind_of[ident] = ident.split(".")[0]

    def _bind(self, directory, name, ident):
        candidates = self.objects[directory].entries.setdefault(name, [None])
        replaced = candidates[-1]
        if replaced is not None:
            self.objects[replaced].anchored = False
        candidates.append(ident)

    def on_bind(self, directory, name, ident):
        self._bind(directory, name, ident)

    def on_unbind(self, directory, name):
        self._bind(directory, name, None)

    def on_move(self, directory, name, new_directory, new_name):
        moved = self.objects[directory].entries[name][-1]
        anchored = self.objects[moved].anchored
        self._bind(new_directory, new_name, moved)
        self._bind(directory, name, None)
        self.objects[moved].anchored = anchored

    def on_write(self, ident, offset, length, seed):
        self.objects[ident].content.change(write(offset, length, seed))

    def on_size(self, ident, size):
        self.objects[ident].content.change(resize(size))

    def on_zero(self, ident, offset, length):
        self.objects[ident].content.change(zero(offset, length))

    def on_undo(self, ident):
        self.objects[ident].content.undo()

    def on_attribute(self, ident, name, length, seed):
        value = None if seed is None else data_of(seed, length)
        self.objects[ident].attributes.setdefault(name, [None]).append(value)

    def on_ack(self, idents, names):
        self.acknowledgements += 1
        for ident in idents:
            self.objects[ident].content.acknowledge()
            attributes = self.objects[ident].attributes
            attributes.update({name: values[-1:] for name, values in attributes.items()})
        for directory, name in names:
            entries = self.objects[directory].entries
            entries[name] = entries[name][-1:]
            if entries[name][0] is not None:
                self.objects[entries[name][0]].anchored = True

    def on_sql(self, mode, number, what):
        begun, acknowledged = self.commits.get(mode, (0, -1))
        self.commits[mode] = (number, acknowledged) if what == "begin" else (begun, number)
        self.acknowledgements += what == "ack"

    def on_pid(self, _pid):
        pass

    def on_stopped(self, kind, error):
        self.stopped.append((kind, error))


class Check:
    """Compares a mounted tree with a model. `faults` are (kind, class, place, text); `refused` are paths of files that do not open, each
    with the path of what was salvaged of it; `scratch` is a directory for putting such files together."""

    def __init__(self, model, root, unit, recover, refused=(), scratch=None):
        self.recover, self.refused, self.scratch = recover, dict(refused), scratch
        self.model, self.root, self.unit, self.faults, self.zero_ends = model, root, unit, [], set()

    def run(self, kinds):
        for kind in kinds:
            path = os.path.join(self.root, kind)
            if kind == "postgres":
                self.faults += [(kind, *fault) for fault in self.recover(path, self.model.commits)]
            elif kind == "sqlite":
                self.faults += [(kind, *fault) for fault in self.databases(path)]
            else:
                self.faults += [(kind, *fault) for fault in self.faults_of(kind, path)]
        for ident, thing in self.model.objects.items():
            if thing.anchored and not thing.found:
                self.faults.append((self.model.kind_of[ident], LOST, ident, f"the {thing.kind} has none of its names"))
        return self.faults

    def faults_of(self, ident, path):
        thing = self.model.objects[ident]
        try:
            mode = os.lstat(path).st_mode
            if thing.kind == "link":
                return [] if os.readlink(path) == thing.target else [(LOST, path, "another link target")]
            if thing.kind == "dir":
                return self.attributes(thing, path) + self.directory(thing, path)
            if not stat.S_ISREG(mode):
                return [(LOST, path, "not a file")]
            if path in self.refused:
                return self.cut_off(thing, path)
            with open(path, "rb") as file:
                found = file.read()
            fault = thing.content.fault(found, self.unit)
            if not fault and thing.content.ends_in_zeros(found):
                self.zero_ends.add(self.model.kind_of[ident])
            return self.attributes(thing, path) + ([(LOST, path, fault)] if fault else [])
        except OSError as error:
            return [(UNOPENABLE, path, str(error))]

    def cut_off(self, thing, path):
        """A file that is refused, as it may be; what its writer had synced is in its copy."""
        try:
            with open(path, "rb"):
                return [(LOST, path, "kmsfs check refuses it, and the mount does not")]
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        if not thing.content.may_be_cut_off():
            return [(LOST, path, "it is refused, and was synced as it is")]
        copy = self.refused[path]
        fault = thing.content.fault(copy.read_bytes() if copy.exists() else b"", self.unit)
        return [(LOST, path, f"what was salvaged of it: {fault}")] if fault else []

    def attributes(self, thing, path):
        faults = []
        shown = os.listxattr(path)
        for name, values in thing.attributes.items():
            try:
                value = os.getxattr(path, name)
            except OSError as error:
                if error.errno != 61:
                    raise
                value = None
            if value not in values or (value is not None) != (name in shown):
                faults.append((LOST, path, f"attribute {name[:20]} is {value and value[:8]}"))
        return faults

    def directory(self, thing, path):
        faults = []
        there = set(os.listdir(path))
        for name, candidates in thing.entries.items():
            place = os.path.join(path, name)
            if name not in there:
                if None not in candidates:
                    faults.append((LOST, place, "the name is gone"))
                continue
            there.discard(name)
            idents = [ident for ident in candidates if ident is not None]
            if not idents:
                faults.append((UNDONE, place, "the name should be gone"))
            best = None
            for ident in idents:
                found = self.faults_of(ident, place)
                if not found:
                    self.model.objects[ident].found = True
                if best is None or len(found) < len(best):
                    best = found
            if best and any(fault[0] == UNOPENABLE for fault in best):
                for ident in idents:
                    self.model.objects[ident].found = True  # reported once, as what does not open
            faults += best or []
        faults += [(LOST, os.path.join(path, name), "nobody made this name") for name in there]
        probe = os.path.join(path, "probe")
        with open(probe, "xb") as file:
            file.write(b"usable")
        os.unlink(probe)
        return faults

    def databases(self, path):
        faults = []
        for mode, (begun, acknowledged) in self.model.commits.items():
            place = os.path.join(path, f"{mode}.db")
            if any(other.startswith(place) for other in self.refused):
                place = self.restored(place)
            try:
                database = sqlite3.connect(place)
                verdict = database.execute("PRAGMA integrity_check").fetchone()[0]
                rows = database.execute("SELECT n, bytes FROM rows ORDER BY n").fetchall()
                database.close()
            except sqlite3.Error as error:
                faults.append((UNOPENABLE, place, str(error)))
                continue
            good = [n for n, data in rows if data == data_of(n, 1 + 37 * n % 6000)]
            if verdict != "ok":
                faults.append((UNOPENABLE, place, verdict))
            elif good != list(range(1, len(rows) + 1)) or not acknowledged <= len(rows) <= max(begun, acknowledged):
                faults.append((LOST, place, f"{len(rows)} rows, {len(good)} good; {acknowledged} were committed"))
        return faults

    def restored(self, place):
        """The database beside copies of its files that are refused, as somebody would restore it."""
        into = Path(tempfile.mkdtemp(prefix="restored-", dir=self.scratch))
        for suffix in ("", "-wal", "-journal"):
            path = place + suffix
            source = self.refused.get(path, Path(path))
            if source.exists():
                shutil.copyfile(source, into / (os.path.basename(path)))
        return str(into / os.path.basename(place))
