"""What runs on the mount until the power goes: one thread a kind of change."""

import ctypes
import json
import os
import random
import sqlite3
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from powercut_rig.actor import KEEP_SIZE, LIBC, PUNCH_HOLE, ZERO_RANGE, Actor, Journal, Thing, data_of  # noqa: E402
from powercut_rig.postgres import postgres  # noqa: E402


def overwrite(actor):
    files = [actor.born(actor.root, actor.fresh("file"), actor.length() + 200) for _ in range(3)]
    while True:
        file = actor.rng.choice(files)
        for _ in range(actor.rng.randint(1, 4)):
            offset = actor.rng.randrange(file.size)
            actor.write(file, offset, min(actor.length(), file.size - offset))
        if actor.rng.random() < 0.85:
            actor.sync(file)
            actor.acknowledge([file])
        yield


def append(actor):
    while True:
        flags = actor.rng.choice((0, 0, os.O_DSYNC, os.O_SYNC))
        file = actor.create(actor.root, actor.fresh("log"), flags)
        actor.sync(file)
        actor.sync(actor.root)
        actor.acknowledge([file], [actor.name_of(file)])
        while file.size < 120_000:
            for _ in range(actor.rng.randint(1, 3)):
                actor.write(file, file.size, actor.length())
                if flags:
                    actor.acknowledge([file])
            if not flags:
                actor.sync(file)
                actor.acknowledge([file])
            yield
        actor.close(file)


def create(actor, length=lambda rng: 0):
    there = []
    while True:
        file = actor.create(actor.root, actor.fresh("new", length(actor.rng)))
        for _ in range(actor.rng.randint(0, 3)):
            actor.write(file, actor.rng.randint(0, file.size), actor.length())
        fate = actor.rng.random()
        if fate < 0.8:
            actor.sync(file)
            actor.acknowledge([file])
        if fate < 0.6:
            actor.sync(actor.root)
            actor.acknowledge([], [actor.name_of(file)])
            there.append(file)
        actor.close(file)
        if there and actor.rng.random() < 0.3:
            gone = actor.remove(there.pop(actor.rng.randrange(len(there))))
            if actor.rng.random() < 0.7:
                actor.sync(actor.root)
                actor.acknowledge([], [gone])
        yield


def rename(actor, length=lambda rng: 0):
    """Write, sync and rename over; and files that move to names of their own."""
    targets = {name: actor.born(actor.root, name, actor.length()) for name in (actor.fresh("target", length(actor.rng)) for _ in range(3))}
    movers = []
    while True:
        name = actor.rng.choice(list(targets))
        file = actor.create(actor.root, actor.fresh("tmp", length(actor.rng)))
        actor.write(file, 0, actor.length())
        actor.sync(file)
        actor.acknowledge([file])
        changed = actor.move(file, actor.root, name)
        targets[name] = file
        actor.close(file)
        if movers and actor.rng.random() < 0.5:
            mover = movers[actor.rng.randrange(len(movers))]
            changed += actor.move(mover, actor.root, actor.fresh("moved", length(actor.rng)))
        if actor.rng.random() < 0.7:
            actor.sync(actor.root)
            actor.acknowledge([], changed)
        if len(movers) < 5:
            movers.append(actor.born(actor.root, actor.fresh("mover", length(actor.rng)), actor.length()))
            actor.close(movers[-1])
        yield


def mkdir(actor, length=lambda rng: 0):
    """New directories with files and links in them, synced from above or from below; moved and removed."""
    empty, full = [], []
    while True:
        parent = actor.rng.choice([actor.root, actor.root, *full[-3:]])
        directory = actor.mkdir(parent, actor.fresh("dir", length(actor.rng)))
        above = actor.rng.random() < 0.4
        if above:
            actor.sync(parent)
            actor.acknowledge([], [actor.name_of(directory)])
        if actor.rng.random() < 0.3:
            if above:
                empty.append(directory)
        else:
            file = actor.create(directory, actor.fresh("inner", length(actor.rng)))
            actor.write(file, 0, actor.length())
            names = [actor.name_of(file)]
            if actor.rng.random() < 0.4:
                target = actor.fresh("to/" + "y" * actor.rng.randint(0, 300))
                names.append(actor.name_of(actor.symlink(directory, actor.fresh("link", length(actor.rng)), target)))
            actor.sync(file)
            actor.acknowledge([file])
            actor.close(file)
            if above or actor.rng.random() < 0.6:
                actor.sync(directory)
                if not above:
                    actor.sync(parent)
                actor.acknowledge([], [*names, actor.name_of(directory)])
                full.append(directory)
        if full and actor.rng.random() < 0.2:
            moved = actor.rng.choice(full)
            if not any(other.parent is moved for other in full + empty):
                old = moved.parent
                changed = actor.move(moved, old, actor.fresh("turned", length(actor.rng)))
                actor.sync(old)
                actor.acknowledge([], changed)
        if empty and actor.rng.random() < 0.4:
            victim = empty.pop()
            gone = actor.remove(victim)
            if actor.rng.random() < 0.6:
                actor.sync(victim.parent)
                actor.acknowledge([], [gone])
        yield


def truncate(actor):
    files = [actor.born(actor.root, actor.fresh("file"), actor.length()) for _ in range(3)]
    while True:
        file = actor.rng.choice(files)
        for _ in range(actor.rng.randint(1, 3)):
            if actor.rng.random() < 0.6:
                actor.truncate(file, actor.rng.choice((0, actor.length(), actor.rng.randint(0, file.size), file.size // 2)))
            else:
                actor.write(file, actor.rng.randint(0, file.size + 5000), actor.length())
        if actor.rng.random() < 0.8:
            actor.sync(file)
            actor.acknowledge([file])
        yield


def long_length(rng):
    return rng.choice((0, 175, 176, rng.randint(150, 255), 255))


def longnames(actor):
    parts = [part(actor, long_length) for part in (create, rename, mkdir)]
    while True:
        next(actor.rng.choice(parts))
        yield


def xattrs(actor):
    things = [actor.born(actor.root, actor.fresh("file"), actor.rng.choice((0, actor.length()))) for _ in range(2)]
    directory = actor.mkdir(actor.root, actor.fresh("dir"))
    actor.sync(actor.root)
    actor.acknowledge([], [actor.name_of(directory)])
    things.append(directory)
    has = {thing.id: set() for thing in things}
    while True:
        thing = actor.rng.choice(things)
        name = actor.rng.choice(("user.a", "user.b", "user." + "l" * 190))
        if name in has[thing.id] and actor.rng.random() < 0.3:
            actor.set_attribute(thing, name, None)
            has[thing.id].discard(name)
        else:
            actor.set_attribute(thing, name, actor.rng.choice((0, 1, 30, 400)))
            has[thing.id].add(name)
        if thing.fd is not None and actor.rng.random() < 0.3:
            actor.write(thing, actor.rng.randint(0, thing.size), actor.length())
        if actor.rng.random() < 0.8:
            if thing.fd is None or actor.rng.random() < 0.5:
                actor.sync(Thing(thing.id, thing.path))
            else:
                os.fsync(thing.fd) if not actor.journal.liar else None
            actor.acknowledge([thing])
        yield


def allocate(actor):
    files = [actor.born(actor.root, actor.fresh("file"), 30_000 + actor.length()) for _ in range(2)]
    while True:
        file = actor.rng.choice(files)
        for _ in range(actor.rng.randint(1, 3)):
            offset = actor.rng.randrange(file.size)
            length = min(actor.length(), file.size - offset)
            mode = actor.rng.choice((KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, KEEP_SIZE | ZERO_RANGE, None))
            if mode is None or not actor.fallocate(file, mode, offset, length):
                actor.write(file, offset, length)
        if actor.rng.random() < 0.8:
            actor.sync(file)
            actor.acknowledge([file])
        yield


def sqlite(actor):
    """Commits in a database with a write-ahead log and in one with a rollback journal."""
    databases = {}
    for mode in ("wal", "delete"):
        path = os.path.join(actor.root.path, f"{mode}.db")
        database = sqlite3.connect(path, isolation_level=None)
        database.execute(f"PRAGMA journal_mode={mode}")
        # With less than EXTRA, a rollback journal whose removal is not durable takes the last commit back: SQLite says so.
        level = "OFF" if actor.journal.liar else "FULL" if mode == "wal" else "EXTRA"
        database.execute(f"PRAGMA synchronous={level}")
        database.execute("PRAGMA wal_autocheckpoint=40")
        database.execute("CREATE TABLE rows (n INTEGER PRIMARY KEY, bytes BLOB)")
        if not actor.journal.liar:
            actor.sync(Thing("", actor.root.path))
        actor.note("sql", mode, 0, "ack")
        databases[mode] = [database, 0]
    while True:
        mode = actor.rng.choice(("wal", "wal", "delete"))
        database, count = databases[mode]
        actor.note("sql", mode, count + 1, "begin")
        database.execute("INSERT INTO rows VALUES (?, ?)", (count + 1, data_of(count + 1, 1 + 37 * (count + 1) % 6000)))
        actor.note("sql", mode, count + 1, "ack")
        databases[mode][1] += 1
        yield


USUAL = (overwrite, append, create, rename, mkdir, truncate, longnames, xattrs, allocate, sqlite)
KINDS = {kind.__name__: kind for kind in (*USUAL, postgres)}


def disturb(backing, seed, how):
    """Does to the backing filesystem what a kernel short of memory and other programs do: begins to write files, in any order and
    without flushing the disk, and makes everything durable now and then."""
    rng, top = random.Random(seed), os.open(backing, os.O_RDONLY)
    while True:
        time.sleep(rng.uniform(0.005, 0.1) if how != "sync" else rng.uniform(0.02, 0.5))
        if how == "sync" or how == "both" and rng.random() < 0.1:
            LIBC.syncfs(top)
            continue
        files = [os.path.join(directory, name) for directory, _, names in os.walk(backing) for name in names]
        for path in rng.sample(files, min(len(files), rng.randint(1, 10))):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            LIBC.sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(0), 2)
            os.close(fd)


def act(kind, journal, root, seed, pace):
    actor = Actor(kind, journal, root, seed)
    try:
        for _ in KINDS[kind](actor):
            if pace:
                time.sleep(actor.rng.uniform(0, pace))
    except BaseException as error:  # noqa: BLE001 what stops a thread is reported, whatever it is
        journal.note("stopped", kind, repr(error))


def main():
    settings = json.loads(sys.argv[1])
    journal, root, seed = Journal(settings["journal"], settings["liar"]), settings["root"], settings["seed"]
    threads = [
        threading.Thread(target=act, args=(kind, journal, root, f"{seed}{kind}", settings["pace"])) for kind in settings["kinds"]
    ]
    if settings["disturb"] != "no":
        threads.append(threading.Thread(target=disturb, args=(settings["backing"], seed, settings["disturb"]), daemon=True))
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
