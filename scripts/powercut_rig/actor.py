"""What one thread of the workload does to objects, and the journal in which it says so: outside of the disk, before each change,
and, after a sync that returned, what it takes for durable. `model.py` reads that journal.

An event is a JSON line `[time, what, ...]` with the monotonic clock in nanoseconds. Objects have ids, never paths: a name is
(id of the directory, name)."""

import ctypes
import json
import mmap
import os
import random
import time

LIBC = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
PAYLOAD = 4048


def data_of(seed, length):
    """Bytes without zeros, so that what was lost shows."""
    return random.Random(seed).randbytes(length).replace(b"\0", b"\1")


class Journal:
    def __init__(self, path, liar):
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.liar = liar

    def note(self, *event):
        os.write(self.fd, (json.dumps([time.monotonic_ns(), *event]) + "\n").encode())


class Thing:
    """An object that a thread made: its id, and where it is now."""

    def __init__(self, ident, path, parent=None, fd=None):
        self.id, self.path, self.parent, self.fd = ident, path, parent, fd
        self.size = 0

    @property
    def name(self):
        return os.path.basename(self.path)


class Actor:
    """The operations of one thread, each noted before it is done."""

    def __init__(self, kind, journal, root, seed):
        self.kind, self.journal, self.rng = kind, journal, random.Random(seed)
        self.root = Thing(kind, os.path.join(root, kind))
        self.count = 0

    def note(self, *event):
        self.journal.note(*event)

    def fresh(self, prefix="n", length=0):
        self.count += 1
        name = f"{prefix}{self.count}"
        return name + "x" * (length - len(name))

    def _new(self, kind, parent, name, target=None):
        thing = Thing(f"{self.kind}.{self.fresh()}", os.path.join(parent.path, name), parent)
        self.note("new", thing.id, kind, target)
        self.note("bind", parent.id, name, thing.id)
        return thing

    def create(self, parent, name, flags=0):
        thing = self._new("file", parent, name)
        thing.fd = os.open(thing.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o644)
        return thing

    def mkdir(self, parent, name):
        thing = self._new("dir", parent, name)
        os.mkdir(thing.path)
        return thing

    def symlink(self, parent, name, target):
        thing = self._new("link", parent, name, target)
        os.symlink(target, thing.path)
        return thing

    def move(self, thing, parent, name):
        old = (thing.parent.id, thing.name)
        self.note("move", *old, parent.id, name)
        path = os.path.join(parent.path, name)
        os.rename(thing.path, path)
        thing.path, thing.parent = path, parent
        return [old, (parent.id, name)]

    def remove(self, thing):
        self.note("unbind", thing.parent.id, thing.name)
        (os.rmdir if os.path.isdir(thing.path) else os.unlink)(thing.path)
        return (thing.parent.id, thing.name)

    def close(self, thing):
        os.close(thing.fd)
        thing.fd = None

    def write(self, thing, offset, length):
        seed = self.rng.getrandbits(40)
        self.note("write", thing.id, offset, length, seed)
        data = data_of(seed, length)
        if offset + length <= thing.size and self.rng.random() < 0.15:
            with mmap.mmap(thing.fd, thing.size) as mapped:
                mapped[offset : offset + length] = data
        else:
            while data:
                done = os.pwrite(thing.fd, data, offset)
                data, offset = data[done:], offset + done
        thing.size = max(thing.size, os.fstat(thing.fd).st_size)

    def truncate(self, thing, size):
        self.note("size", thing.id, size)
        os.ftruncate(thing.fd, size)
        thing.size = size

    def fallocate(self, thing, mode, offset, length):
        """Anything that makes zeros or nothing. Returns whether the filesystem can."""
        if mode != KEEP_SIZE:
            self.note("zero", thing.id, offset, length)
        done = LIBC.fallocate(thing.fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) == 0
        if not done and mode != KEEP_SIZE:
            self.note("undo", thing.id)
        return done

    def set_attribute(self, thing, name, length):
        seed = None if length is None else self.rng.getrandbits(40)
        self.note("attribute", thing.id, name, length, seed)
        if seed is None:
            os.removexattr(thing.path, name)
        else:
            os.setxattr(thing.path, name, data_of(seed, length))

    def sync(self, thing):
        """Makes content and attributes of an object durable; the caller acknowledges."""
        if self.journal.liar:
            return
        fd = thing.fd if thing.fd is not None else os.open(thing.path, os.O_RDONLY)
        try:
            (os.fsync if self.rng.random() < 0.7 or thing.fd is None else os.fdatasync)(fd)
        finally:
            if thing.fd is None:
                os.close(fd)

    def sync_everything(self):
        """For what is prepared, not for what is acknowledged."""
        fd = os.open(self.root.path, os.O_RDONLY)
        LIBC.syncfs(fd)
        os.fsync(fd)
        os.close(fd)
        os.sync()

    def acknowledge(self, things=(), names=()):
        self.note("ack", [thing.id for thing in things], [list(name) for name in names])

    def name_of(self, thing):
        return (thing.parent.id, thing.name)

    def born(self, parent, name, length):
        """A file that is durable with its name."""
        thing = self.create(parent, name)
        if length:
            self.write(thing, 0, length)
        self.sync(thing)
        self.sync(parent)
        self.acknowledge([thing], [self.name_of(thing)])
        return thing

    def length(self):
        rng = self.rng
        about = rng.choice((rng.randint(1, 300), PAYLOAD, 2 * PAYLOAD, rng.randint(1, 12000), 4096 * rng.randint(1, 6), 40000))
        return max(1, about + rng.choice((0, 0, 1, -1)))
