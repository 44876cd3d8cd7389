"""Who changes a file or its owner in which way, and what becomes of its mode: on a mount, and on a plain directory beside it."""
import ctypes, errno, mmap, os, stat, struct, sys

ROOTS = sys.argv[1:3]
LIBC = ctypes.CDLL(None, use_errno=True)
OWNER, GROUP, OTHER, STRANGER = 6001, 200, 201, 65534
ANY = 0xFFFFFFFF
ENTRIES = (1, 7, ANY), (2, 7, 5), (4, 7, ANY), (16, 7, ANY), (32, 7, ANY)
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in ENTRIES)


def allocate(mode, offset, length):
    def change(path, fd):
        if LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
            raise OSError(ctypes.get_errno(), "fallocate")

    return change


def write_around_the_cache(path, fd):
    direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    os.pwrite(direct, page, 0)


CHANGES = dict(
    write=lambda path, fd: os.pwrite(fd, b"x", 0),
    nothing=lambda path, fd: os.pwrite(fd, b"", 0),
    append=lambda path, fd: os.pwrite(fd, b"x" * 5000, 8192),
    direct=write_around_the_cache,
    truncate=lambda path, fd: os.truncate(path, 100),
    ftruncate=lambda path, fd: os.ftruncate(fd, 100),
    o_trunc=lambda path, fd: os.open(path, os.O_WRONLY | os.O_TRUNC),
    allocate=allocate(0, 0, 200_000),
    punch=allocate(3, 0, 8192),
    zero=allocate(16, 0, 8192),
    copy=lambda path, fd: os.copy_file_range(fd, fd, 1024, 0, 4096),
    chown=lambda path, fd: os.chown(path, -1, -1),
    chgrp=lambda path, fd: os.chown(path, -1, OTHER),
    chmod=lambda path, fd: os.chmod(path, 0o6755),
    acl=lambda path, fd: os.setxattr(path, "system.posix_acl_access", ACL),
    touch=lambda path, fd: os.utime(path),
)


def user(uid, gid, groups=()):
    def become():
        os.setgroups(groups), os.setresgid(gid, gid, gid), os.setresuid(uid, uid, uid)

    return become


def root_of_a_namespace():
    user(STRANGER, STRANGER)()
    LIBC.prctl(4, 1, 0, 0, 0)
    assert LIBC.unshare(0x10000000) == 0
    for name, text in ("setgroups", "deny"), ("uid_map", f"0 {STRANGER} 1"), ("gid_map", f"0 {STRANGER} 1"):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


USERS = dict(
    root=lambda: None,
    owner=user(OWNER, OTHER),
    owner_in_group=user(OWNER, OTHER, [GROUP]),
    member=user(STRANGER, GROUP),
    stranger=user(STRANGER, STRANGER),
    namespace=root_of_a_namespace,
)


def in_child(work):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            told = "ok"
        except OSError as error:
            told = errno.errorcode[error.errno]
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    told = os.read(read, 100).decode()
    os.close(read)
    os.waitpid(child, 0)
    return told


def outcome(root, kind, mode, become, change):
    path = f"{root}/it"
    if kind == "directory":
        os.mkdir(path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        with open(path, "wb") as file:
            file.write(b"A" * 8192)
    os.chown(path, OWNER, GROUP)
    os.chmod(path, mode)
    os.stat(path)

    def work():
        become()
        fd = os.open(path, os.O_RDWR if kind == "file" else os.O_RDONLY | os.O_NONBLOCK)
        change(path, fd)

    told = in_child(work)
    found = f"{told} {stat.S_IMODE(os.stat(path).st_mode):o}"
    (os.rmdir if kind == "directory" else os.unlink)(path)
    return found


tried = differences = 0
OF_OTHERS = ["chown", "chgrp", "chmod", "acl", "touch"]
for kind, names in ("file", CHANGES), ("directory", OF_OTHERS), ("fifo", OF_OTHERS):
    for mode in 0o4666, 0o2666, 0o6666, 0o2676, 0o6777, 0o777:
        for who, become in USERS.items():
            for name in names:
                mount, plain = (outcome(root, kind, mode, become, CHANGES[name]) for root in ROOTS)
                tried += 1
                if mount != plain:
                    differences += 1
                    print(f"{name} of a {kind} with {mode:o} by {who}: {mount} on the mount, {plain} on the plain directory")
print(f"{tried} tried, {differences} differ")
