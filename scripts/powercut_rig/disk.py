"""A disk in user space that forgets: one file, served through /dev/fuse without a page cache, which remembers what was written
since the last flush. A loop device over it passes its flushes down as fsync.

`durable` is what a power cut certainly leaves; `current` is what the host reads back. A cut takes `durable` and a random
part of the writes since, whole requests or single 4 KiB pages."""

import contextlib
import ctypes
import mmap
import os
import random
import select
import socket
import struct
import time
from multiprocessing import Process
from multiprocessing.connection import Connection

PAGE = 4096
MAX_WRITE = 1 << 20
HEADER = struct.Struct("<IIQQIIIHH")
LOOKUP_NONE = (2, 36, 42)  # forget, interrupt, batch forget: no answer
ENOSYS, EIO = 38, 5
PUNCH_HOLE, ZERO_RANGE = 0x02, 0x10


def pages_of(offset, data):
    """The parts of a write by the 4 KiB pages of the disk that they lie in."""
    start = 0
    while start < len(data):
        end = min(len(data), start + PAGE - (offset + start) % PAGE)
        yield offset + start, data[start:end]
        start = end


class Medium:
    """What is on the disk, and what is only in its cache."""

    def __init__(self, size):
        self.size = size
        self.durable, self.current = mmap.mmap(-1, size), mmap.mmap(-1, size)
        self.pending, self.after = [], []
        self.cut_at = None
        self.armed = None
        self.obeys_flushes = True
        self.writes = self.flushes = self.flushed_writes = 0

    def _event(self):
        if self.armed is not None:
            self.armed -= 1
            if self.armed < 0:
                self.cut()

    def cut(self):
        """From here on nothing reaches the disk, although the host does not notice."""
        if self.cut_at is None:
            self.cut_at, self.armed = time.monotonic_ns(), None

    def write(self, offset, data):
        self._event()
        self.writes += 1
        self.current[offset : offset + len(data)] = data
        (self.pending if self.cut_at is None else self.after).append((offset, data))

    def flush(self):
        self._event()
        self.flushes += 1
        if self.cut_at is None and self.obeys_flushes:
            for offset, data in self.pending:
                self.durable[offset : offset + len(data)] = data
            self.flushed_writes += len(self.pending)
            self.pending.clear()

    def power_on(self, seed):
        """Decides what of the cache survived, and starts again from there. Returns a description."""
        rng = random.Random(seed)
        unit = rng.choice(("requests", "pages"))
        pieces = list(self.pending)
        if unit == "pages":
            pieces = [piece for offset, data in pieces for piece in pages_of(offset, data)]
        how = rng.choice(("none", "few", "half", "most", "all", "one lost", "one kept", "prefix"))
        count = len(pieces)
        share = {"none": 0, "few": 0.1, "half": 0.5, "most": 0.9, "all": 1}.get(how)
        if share is not None:
            kept = [rng.random() < share for _ in pieces]
        elif how == "prefix":
            first = rng.randint(0, count)
            kept = [i < first for i in range(count)]
        else:
            chosen = rng.randrange(count) if count else 0
            kept = [(i == chosen) == (how == "one kept") for i in range(count)]
        for (offset, data), keep in zip(pieces, kept):
            if keep:
                self.durable[offset : offset + len(data)] = data
        for offset, data in self.pending + self.after:
            self.current[offset : offset + len(data)] = self.durable[offset : offset + len(data)]
        self.pending, self.after, self.cut_at, self.armed = [], [], None, None
        return f"{how} of {count} {unit} since the last flush: {sum(kept)} kept"

    def save(self, path):
        """Writes the durable content to a sparse file."""
        with open(path, "wb") as out:
            out.truncate(self.size)
            for offset in range(0, self.size, MAX_WRITE):
                chunk = self.durable[offset : offset + MAX_WRITE]
                if chunk.strip(b"\0"):
                    out.seek(offset)
                    out.write(chunk)


class Server:
    """Speaks the kernel's side of FUSE for one regular file."""

    def __init__(self, size, path, control):
        self.medium, self.control, self.path = Medium(size), control, path
        self.fd = os.open("/dev/fuse", os.O_RDWR)
        open(path, "wb").close()
        options = f"fd={self.fd},rootmode=100000,user_id=0,group_id=0".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"powercut", os.fsencode(path), b"fuse", 6, options):
            raise OSError(ctypes.get_errno(), "mount of the disk")

    def serve(self):
        buffer = bytearray(MAX_WRITE + PAGE)
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        told = False
        while True:
            if self.medium.cut_at is not None and not told:
                self.control.send(("cut", self.medium.cut_at))
            told = self.medium.cut_at is not None
            for ready, event in poll.poll():
                if ready != self.fd:
                    if not self.obey():
                        return
                elif event & select.POLLIN:
                    try:
                        length = os.readv(self.fd, [buffer])
                    except OSError:
                        return
                    self.answer(memoryview(buffer)[:length])
                else:
                    return

    def obey(self):
        try:
            command, argument = self.control.recv()
        except EOFError:
            return False
        medium = self.medium
        if command == "arm":
            medium.armed = argument
        elif command == "cut":
            medium.cut()
        elif command == "counts":
            self.control.send(("counts", (medium.writes, medium.flushes, len(medium.pending))))
        elif command == "flushing":
            medium.obeys_flushes = argument
        elif command == "power on":
            self.control.send(("on", medium.power_on(argument)))
        elif command == "save":
            self.control.send(("saved", medium.save(argument)))
        return True

    def answer(self, message):
        _, opcode, unique, _, _, _, _, _, _ = HEADER.unpack_from(message)
        if opcode in LOOKUP_NONE:
            return
        body = message[HEADER.size :]
        try:
            error, payload = 0, self.perform(opcode, body)
        except OSError as failure:
            error, payload = failure.errno, b""
        with contextlib.suppress(FileNotFoundError):  # nobody waits for this answer any more
            os.writev(self.fd, [struct.pack("<IiQ", 16 + len(payload), -error, unique), payload])

    def perform(self, opcode, body):
        medium = self.medium
        if opcode == 16:  # write
            _, offset, size = struct.unpack_from("<QQI", body)
            medium.write(offset, bytes(body[40 : 40 + size]))
            return struct.pack("<II", size, 0)
        if opcode == 15:  # read
            _, offset, size = struct.unpack_from("<QQI", body)
            return medium.current[offset : offset + size]
        if opcode == 20:  # fsync
            medium.flush()
            return b""
        if opcode == 43:  # fallocate: a discard is a write of zeros, and as volatile
            _, offset, length, mode = struct.unpack_from("<QQQI", body)
            if not mode & (PUNCH_HOLE | ZERO_RANGE):
                raise OSError(95, "")
            for start in range(offset, offset + length, MAX_WRITE):
                medium.write(start, bytes(min(MAX_WRITE, offset + length - start)))
            return b""
        if opcode == 26:  # init: large writes, parallel direct I/O
            flags = (1 << 0) | (1 << 5) | (1 << 15) | (1 << 22)
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, flags, 64, 48, MAX_WRITE, 1, MAX_WRITE // PAGE, 0, 0)
        if opcode in (3, 4):  # getattr, setattr
            blocks = medium.size // 512
            attributes = struct.pack("<QQQ24x12xIIIIIII", 1, medium.size, blocks, 0o100600, 1, 0, 0, 0, PAGE, 0)
            return struct.pack("<QII", 1 << 20, 0, 0) + attributes
        if opcode == 14:  # open, past the page cache
            return struct.pack("<QII", 1, 1, 0)
        if opcode in (18, 25, 38):  # release, flush (of a descriptor), destroy
            return b""
        raise OSError(ENOSYS, "")


def _run(size, path, control, other):
    other.close()
    Server(size, path, control).serve()


class Disk:
    """The handle on a disk that a process of its own serves. `path` is its file."""

    def __init__(self, size, path):
        here, there = socket.socketpair()
        self.path = path
        self.control, other = Connection(here.detach()), Connection(there.detach())
        self.process = Process(target=_run, args=(size, path, other, self.control), daemon=True)
        self.process.start()
        other.close()
        deadline = time.monotonic() + 20
        while not os.path.ismount(path):
            if time.monotonic() > deadline or not self.process.is_alive():
                raise RuntimeError("the disk does not start")
            time.sleep(0.01)

    def tell(self, command, argument=None):
        self.control.send((command, argument))

    def expect(self, what, seconds):
        """The value that comes with the next message of this kind; `None` if none comes in time."""
        deadline = time.monotonic() + seconds
        while self.control.poll(max(0, deadline - time.monotonic())):
            kind, value = self.control.recv()
            if kind == what:
                return value
        return None

    def ask(self, command, argument, what):
        self.tell(command, argument)
        return self.expect(what, 60)

    def close(self):
        ctypes.CDLL(None).umount2(os.fsencode(self.path), 2)
        self.control.close()
        self.process.join(10)
