# One program that writes one file of a mount whose layers fail, and knows what it may find.
#
# Each word of 8 bytes says which file it belongs to, which write it came from and where it stands. A word of zeros is right
# only where the file was grown past it and nothing has been synced there since.
import array, errno, mmap, os, random, sys, time

path, kind, tag, seed, seconds, stop = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), sys.argv[6]
rng, MOST = random.Random(seed), 1 << 15
hole, synced = bytearray(MOST), [0] * MOST   # may be zero; at least so new
steps = []
size, sure, generation, told, operations, doubt = 0, 0, 0, 0, 0, False   # in words: taken for the size; durable; and counts

def words(first, count):
    global generation
    generation += 1
    return array.array('Q', ((tag << 56) | (generation << 24) | at for at in range(first, first + count))).tobytes()

def die(what):
    print('\n'.join(steps[-40:]), file=sys.stderr, flush=True)
    print(f'{path} ({kind}, seed {seed}, write {generation}): {what}', flush=True)
    os._exit(1)

def check(first, data):
    found = array.array('Q', data[:len(data) // 8 * 8])
    for at, word in enumerate(found, first):
        if word == 0:
            if not hole[at]: die(f'word {at}: a zero that nobody wrote, size {size}, durable {sure}')
            if synced[at]: die(f'word {at}: synced, and zero now')
        elif word >> 56 != tag or word & 0xffffff != at or (word >> 24) & 0xffffffff > generation:
            die(f'word {at}: {word:016x} was never written there')
        elif (word >> 24) & 0xffffffff < synced[at]:
            die(f'word {at}: older than what was synced')
    if len(data) % 8: die(f'{len(data)} bytes after word {first}')

def put(fd, first, count, end=False):
    steps.append(f'write {first} {count} of {size}')
    data = words(first, count)
    done = (os.write(fd, data) if end else os.pwrite(fd, data, first * 8))
    if done % 8: die(f'{done} bytes were written')
    wrote(first, done // 8)

def wrote(first, count):
    global size
    for at in range(size, first): hole[at] = 1
    for at in range(max(first, size), first + count): hole[at] = 0
    size = max(size, first + count)

def shrunk(to):
    global size, sure
    for at in range(to, MOST): hole[at] = synced[at] = 0
    size, sure = to, min(sure, to)

def settle(data):
    global doubt
    # The file is what is there, after something was told to be lost.
    if len(data) // 8 < sure: die(f'{len(data)} bytes, and {sure * 8} were synced')
    check(0, data)
    shrunk(len(data) // 8)
    doubt = False

def sync(fd):
    global sure
    at_most, now = size, generation
    steps.append(f'sync {size}')
    os.fsync(fd)
    # The end was the program's: all of it is there.
    if not doubt: sure = at_most
    data = array.array('Q', pending_read(fd))
    for at, word in enumerate(data):
        if word: synced[at] = (word >> 24) & 0xffffffff; hole[at] = 0

def whole(fd):
    # A read that ends early is no end: the next one tells.
    data = b''
    while more := os.pread(fd, MOST * 8, len(data)): data += more
    return data

def pending_read(fd):
    data = whole(fd)
    check(0, data)
    return data

def step(fd):
    global size
    what = rng.random()
    count = rng.choice([1, 7, 64, 506, 512, 1500])
    if kind == 'append' or (kind == 'map' and size < 600 and what < .5):
        if size + count > MOST: os.ftruncate(fd, 0); shrunk(0); return
        put(fd, size, count) if kind != 'append' else append(fd, count)
    elif kind == 'overwrite':
        first = rng.randrange(0, min(size + 1, MOST - count))
        put(fd, first, count)
    elif kind == 'far':
        first = min(size + rng.choice([0, 0, 300, 2000]), MOST - count)
        if first + count >= MOST: os.ftruncate(fd, 0); shrunk(0); return
        put(fd, first, count)
    elif kind == 'truncate':
        if what < .6:
            first = rng.randrange(0, min(size + 1, MOST - count))
            put(fd, first, count)
        else:
            to = rng.choice([0, size // 2, size, min(size + count, MOST)])
            steps.append(f'truncate {size} to {to}')
            os.ftruncate(fd, to * 8)
            if to < size: shrunk(to)
            else: grown(to)
    elif kind == 'map':
        if not size: put(fd, 0, count); return
        first = rng.randrange(0, size); count = min(count, size - first)
        data, child = words(first, count), os.fork()
        if child == 0:   # what is lost ends it
            try:
                m = mmap.mmap(fd, size * 8)
                m[first * 8:(first + count) * 8] = data
                if what < .3: m.flush()
                os._exit(0)
            except OSError: os._exit(1)
        if os.waitpid(child, 0)[1] != 0: raise OSError(errno.EIO, 'mapped')
    if rng.random() < .2: sync(fd)
    elif rng.random() < .2: pending_read(fd)

def grown(to):
    global size
    for at in range(size, to): hole[at] = 1
    size = max(size, to)

def append(fd, count):
    # Where the kernel puts it.
    end = os.fstat(fd).st_size // 8
    put(fd, end, count, True)

flags = os.O_RDWR | os.O_CREAT | (os.O_APPEND if kind == 'append' else 0)
until, fd = time.time() + seconds, None
while time.time() < until and not os.path.exists(stop):
    operations += 1
    try:
        if fd is None:
            fd = os.open(path, flags, 0o600)
            steps.append('opened')
            settle(whole(fd))
            steps.append(f'found {size}')
        step(fd)
    except OSError as error:
        doubt = True
        steps.append(f'{error}')
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EKEYREVOKED, errno.ENOKEY, errno.ETIMEDOUT, errno.EKEYEXPIRED, errno.EFBIG, errno.EOPNOTSUPP): raise
        told += 1
        # Half of the programs go on with what they have open.
        if fd is not None and rng.random() < .5:
            try: os.close(fd)
            except OSError: pass
            fd = None
            time.sleep(.01)
        elif fd is not None:
            try: settle(whole(fd)) if os.fstat(fd).st_size == 0 else None
            except OSError: pass
            time.sleep(.005)
try: os.close(fd) if fd is not None else None
except OSError: pass
while not os.path.exists(stop): time.sleep(.05)
for attempt in range(600):
    try:
        with open(path, 'rb') as f: data = f.read()
        break
    except FileNotFoundError: data = b''; break
    except OSError as error: last = error; time.sleep(.05)
else: die(f'not readable after all is well: {last}')
settle(data)
print(f'{operations} {told}', flush=True)
sys.stdin.readline()   # mounted anew
data = open(path, 'rb').read() if os.path.exists(path) else b''
if len(data) // 8 != size: die(f'{len(data)} bytes after a mount, and {size * 8} before')
check(0, data)
print('well', flush=True)
