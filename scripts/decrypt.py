#!/usr/bin/env python3
"""Decrypts a kmsfs cipher directory under a local keyring. Written from docs/FORMAT.md alone; numbers are its sections.

    decrypt.py CIPHERDIR OUTDIR [--keyring FILE] [--passphrase-file FILE]

Prints every plain path and writes the tree to OUTDIR, which must not exist. What does not authenticate is named on
stderr and left out, and the exit code is 1. Needs Python 3.11 and the `cryptography` package, version 46 or later.
"""
import argparse, base64, hashlib, hmac, os, re, stat, struct, sys, tomllib, uuid
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PAGE, PAYLOAD, SLOT = 4096, 4048, 2048
MAX_PLAIN = ((2**63 - 1) // PAGE - 2) * PAYLOAD
XAES, XCHACHA = 1, 2
SUITES = {"xaes-256-gcm": XAES, "xchacha20-poly1305": XCHACHA}


class Bad(Exception):
    """What must be refused. `word` is the expectation word of the test vectors."""
    def __init__(self, word, detail=""):
        super().__init__(f"{word}: {detail}" if detail else word)
        self.word = word


# ---- 3 and 5.1: primitives ----

def aead(suite, key, nonce):
    """The AEAD and 12-byte nonce that a suite makes of a key and a 24-byte nonce."""
    return xaes(key, nonce) if suite == XAES else xchacha(key, nonce)


def xaes(key, nonce):
    encrypt = Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update
    l = int.from_bytes(encrypt(bytes(16)))
    k1 = (l << 1 ^ (0x87 if l >> 127 else 0)) & (1 << 128) - 1
    halves = [encrypt((int.from_bytes(bytes([0, i, ord("X"), 0]) + nonce[:12]) ^ k1).to_bytes(16)) for i in (1, 2)]
    return AESGCM(b"".join(halves)), nonce[12:]


def xchacha(key, nonce):
    s = list(struct.unpack("<16I", b"expand 32-byte k" + key + nonce[:16]))

    def quarter_round(a, b, c, d):
        for x, y, z, bits in (a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7):
            s[x] = s[x] + s[y] & 0xFFFFFFFF
            s[z] ^= s[x]
            s[z] = (s[z] << bits | s[z] >> 32 - bits) & 0xFFFFFFFF

    for _ in range(10):
        for i in range(4):
            quarter_round(i, i + 4, i + 8, i + 12)
        for i in range(4):
            quarter_round(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12)
    return ChaCha20Poly1305(struct.pack("<8I", *s[:4], *s[12:])), bytes(4) + nonce[16:]


def unseal(suite, key, nonce, cipher_and_tag, associated, word, what="it"):
    try:
        if len(nonce) != 24:
            raise InvalidTag
        box, nonce = aead(suite, key, nonce)
        return box.decrypt(nonce, cipher_and_tag, associated)
    except InvalidTag:
        raise Bad(word, f"{what} does not authenticate") from None


def hkdf(key, salt, info, length=32):
    return HKDF(SHA256(), length, salt, info).derive(key)


def check_mac(key, data, mac, word):
    if not hmac.compare_digest(hmac.digest(key, data, "sha256")[:len(mac)], mac):
        raise Bad(word, "does not authenticate")


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unbase64(text, word):
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) if re.fullmatch("[A-Za-z0-9_-]*", text) \
        and len(text) % 4 != 1 else b""
    if base64url(data) != text:
        raise Bad(word, "not canonical base64url")
    return data


# ---- 5.3 to 5.5: the local provider ----

def context(**pairs):
    field = lambda text: struct.pack("<H", len(text)) + text.encode()
    return b"".join(field("kmsfs:" + name.replace("_", "-")) + field(pairs[name]) for name in sorted(pairs))


class Keyring:
    def __init__(self, file, passphrase=None):
        body, sealed, seal = file.decode().partition('\n[seal]\nbox = "')
        keyring = tomllib.loads(body)
        if keyring.get("format") != 1:
            raise Bad("unknown version", "the keyring")
        versions = [(key, version) for key in keyring["key"] for version in key["version"]]
        if sealed:
            box = base64.b64decode(seal.removesuffix('"\n'), validate=True)
            key = self.passphrase_key(keyring["passphrase"], passphrase)
            materials = unseal(XAES, key, box[:24], box[24:], body.encode(), "passphrase")
            materials = [materials[i:i + 32] for i in range(0, len(materials), 32)]
        else:
            materials = [base64.b64decode(version["material"], validate=True) for _, version in versions]
        self.keys = {(key["id"], version["number"]): (key["state"], material)
                     for (key, version), material in zip(versions, materials, strict=True)}

    @staticmethod
    def passphrase_key(settings, passphrase):
        from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
        memory, passes, lanes = settings["memory-kib"], settings["passes"], settings["lanes"]
        if settings["kdf"] != "argon2id" or memory > 1 << 20 or passes > 16 or lanes > 16:
            raise Bad("keyring", "its passphrase settings are beyond the caps")
        if not passphrase:
            raise Bad("passphrase", "the keyring is sealed: give --passphrase-file")
        salt = base64.b64decode(settings["salt"], validate=True)
        return Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory).derive(passphrase)

    def unwrap(self, key_id, wrapped, bound):
        if len(wrapped) != 77 or wrapped[0] != 1:
            raise Bad("wrapped key", "not one of the local provider")
        state, key = self.keys.get((key_id, struct.unpack_from("<I", wrapped, 1)[0]), (None, None))
        if state != "enabled":
            raise Bad("key disabled" if state else "no such key", f"{key_id}, or its version")
        bound = wrapped[:5] + struct.pack("<H", len(key_id)) + key_id.encode() + bound
        return unseal(XAES, key, wrapped[5:29], wrapped[29:], bound, "wrapped key")

    def unwrap_any(self, copies, bound):
        """The key in the first copy that opens; the error is that of the first."""
        errors = []
        for key_id, wrapped in copies:
            try:
                return self.unwrap(key_id, wrapped, bound)
            except Bad as error:
                errors += [error]
        raise errors[0]


# ---- 8: the volume ----

FIELDS = {"format", "volume-id", "suite", "holes", "end", "files-per-data-key", "wrapping-key", "volume-key"}


def parse_config(file):
    body, found, seal = file.rpartition(b'\n[seal]\nmac = "')
    if not found or not re.fullmatch(rb'[0-9a-f]{64}"\n', seal) or len(file) > 65536:
        raise Bad("no seal", "the config was cut or edited")
    try:
        config = tomllib.loads(body.decode())
        if type(config.get("format")) is int and config["format"] != 1:
            raise Bad("unknown version", f"of the volume: {config['format']}")
        known = (set(config) == FIELDS and config["holes"] in ("allow", "deny")
                 and config["end"] in ("lenient", "strict") and 1 <= config["files-per-data-key"] <= 1_000_000
                 and str(uuid.UUID(config["volume-id"])) == config["volume-id"]
                 and config["wrapping-key"] and config["volume-key"])
    except (ValueError, TypeError, AttributeError) as error:
        raise Bad("malformed", f"the config: {error}") from None
    if not known:
        raise Bad("malformed", "a field of the config is missing, unknown or impossible")
    if config["suite"] not in SUITES:
        raise Bad("unknown suite", config["suite"])
    return config, body, bytes.fromhex(seal[:64].decode())


class Volume:
    def __init__(self, config_file, keyring, directory=None):
        self.directory = directory
        self.config, body, seal = parse_config(config_file)
        self.keyring, self.suite, self.uuid = keyring, SUITES[self.config["suite"]], self.config["volume-id"]
        self.id = uuid.UUID(self.uuid).bytes
        self.holes, self.strict = self.config["holes"] == "allow", self.config["end"] == "strict"
        self.allowed = {key["key"].encode() for key in self.config["wrapping-key"] if key["provider"] == "local"}
        wrapped = [key for key in self.config["volume-key"] if key["provider"] == "local"]
        if not wrapped:
            raise Bad("wrapped key", "no copy of the volume key is under a local keyring")
        bound = context(purpose="volume", volume=self.uuid)
        copies = [(copy["key"], unbase64(copy["wrapped"], "malformed")) for copy in wrapped]
        key = keyring.unwrap_any(copies, bound)
        label = lambda name, length=32: hkdf(key, self.id, b"kmsfs v1 " + name, length)
        check_mac(label(b"config"), body, seal, "seal")
        self.header_key, self.directory_key, self.link_key = label(b"header"), label(b"directory"), label(b"link")
        self.names = AESSIV(label(b"name", 64))


# ---- 2 to 5: a file ----

def parse_slot(slot, volume):
    magic, version, suite, flags, generation, volume_id, file_id, data_key_id, count = \
        struct.unpack_from("<5s3BQ16s32s16sB", slot)
    if magic != b"KMSFS":
        raise Bad("not a header")
    if version != 1:
        raise Bad("unknown version", str(version))
    if flags:
        raise Bad("unknown flags", f"{flags:#04x}")
    at, records = 81, []
    try:
        for _ in range(count):
            (tag, length), at = struct.unpack_from("<BH", slot, at), at + 3
            key_id, at = slot[at:at + length], at + length
            (length,), at = struct.unpack_from("<H", slot, at), at + 2
            wrapped, at = slot[at:at + length], at + length
            records.append((tag, key_id, wrapped))
        commitment, mac = struct.unpack_from("32s32s", slot, at)
    except struct.error:
        raise Bad("malformed", "a field ends past the slot") from None
    if not records or any(slot[at + 64:]):
        raise Bad("malformed", "no record, or bytes after the MAC")
    if volume_id != volume.id:
        raise Bad("header mac", "another volume")
    check_mac(volume.header_key, slot[:at + 32], mac, "header mac")
    if suite not in SUITES.values():
        raise Bad("unknown suite", str(suite))
    return generation, suite, file_id, data_key_id, records, commitment


def best_slot(header_page, volume):
    slots, errors = [], []
    for slot in header_page[:SLOT], header_page[SLOT:]:
        try:
            slots += [parse_slot(slot, volume)]
        except Bad as error:
            errors += [error] if any(slot) else []
    if not slots:
        raise errors[0]
    return max(slots, key=lambda slot: slot[0])


def file_key(header_page, volume):
    """The suite and the content key of a file."""
    _, suite, file_id, data_key_id, records, commitment = best_slot(header_page, volume)
    ours = [(key_id, wrapped) for tag, key_id, wrapped in records if tag == 1 and key_id in volume.allowed]
    if not ours:
        raise Bad("no usable record", "none is under a key on the volume's list")
    bound = context(data_key=str(uuid.UUID(bytes=data_key_id)), volume=volume.uuid)
    data_key = volume.keyring.unwrap_any([(key_id.decode(), wrapped) for key_id, wrapped in ours], bound)
    if not hmac.compare_digest(hkdf(data_key, file_id, b"kmsfs v1 commit"), commitment):
        raise Bad("commitment", "the unwrapped data key is not this file's")
    return suite, hkdf(data_key, file_id, b"kmsfs v1 content" + bytes([suite]))


def open_page(page, index, suite, key, holes=True):
    """The payload, `len` and LAST. A hole has no payload and the rest of a full last page."""
    if not any(page):
        if not holes:
            raise Bad("hole", f"page {index}")
        return None, PAYLOAD, True
    associated = struct.pack("<Q", index) + page[4072:4080]
    payload = unseal(suite, key, page[:24], page[24:4072] + page[4080:], associated, "page", f"number {index}")
    length, flags, reserved = struct.unpack_from("<HHI", page, 4072)
    if not 1 <= length <= PAYLOAD or flags & ~1 or reserved:
        raise Bad("trailer", f"page {index}")
    return payload, length, flags & 1


def plain_size(disk, len_of_page):
    pages, rest = disk // PAGE - 1, disk % PAGE
    if disk in (0, PAGE):
        return 0
    if pages < 1 or rest >= PAYLOAD or pages > MAX_PLAIN // PAYLOAD:
        raise Bad("impossible size", f"{disk} bytes on disk")
    return (pages - 1) * PAYLOAD + (rest or len_of_page(pages - 1))


def decrypt_file(fd, volume, write):
    """Calls `write(bytes, offset)` for everything but holes; returns the size, and whether the end is marked."""
    disk, header_page, marked = os.fstat(fd).st_size, os.pread(fd, PAGE, 0), True
    if 0 < disk < PAGE:
        raise Bad("impossible size", f"{disk} bytes on disk")
    if not any(header_page):
        if volume.strict:
            raise Bad("no header")
        return 0, disk == 0
    suite, key = file_key(header_page, volume)
    page = lambda index: open_page(os.pread(fd, PAGE, PAGE * (1 + index)), index, suite, key, volume.holes)
    size = plain_size(disk, lambda last: page(last)[1])
    for start in range(0, size, PAYLOAD):
        payload, _, marked = page(start // PAYLOAD)
        if payload:
            write(payload[:size - start], start)
    if not marked and volume.strict:
        raise Bad("end mark", "the file was cut off")
    return size, marked


# ---- 6.8: a file that is half way to a new data key ----

def open_redo_log(fd, volume):
    """The log that says what the file is to become, if one counts."""
    info, page, log = os.fstat(fd), os.pread(fd, PAGE, 0), None
    if len(page) < PAGE:
        return None
    try:
        generation, suite, file_id, *_ = best_slot(page, volume)
        log = os.open(f"{volume.directory}/.kmsfs/rekey/{info.st_ino}-{file_id.hex()}", os.O_RDONLY | os.O_NOFOLLOW)
        is_of_size = os.fstat(log).st_size == info.st_size
        if is_of_size and best_slot(os.pread(log, PAGE, 0), volume)[:3] == (generation + 1, suite, file_id):
            return log
    except (Bad, OSError, IndexError):
        pass
    if log is not None:
        os.close(log)
    return None


# ---- 7: names ----

def directory_id(path, volume):
    signed = unbase64(os.readlink(f"{path}/.kmsfs.dir"), "directory id") if os.listdir(path) else None
    if signed is not None:
        check_mac(volume.directory_key, signed[:16], signed[16:] if len(signed) == 32 else b"\0", "directory id")
        return signed[:16]


def encrypted_name(path, entry):
    """The text of an entry's encrypted name: the entry, or the target of a long name's link."""
    if not entry.startswith("~"):
        return entry
    text = os.readlink(f"{path}/{entry}.n")
    if len(text) <= 255 or "~" + base64url(hashlib.sha256(text.encode()).digest()) != entry:
        raise Bad("long name", "the link does not match")
    return text


def decrypt_name(text, directory, volume):
    try:
        name = volume.names.decrypt(unbase64(text, "name"), [directory])
    except (InvalidTag, ValueError):
        raise Bad("name", "does not authenticate") from None
    if not 1 <= len(name) <= 255 or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise Bad("no name", "what the name decrypts to")
    return name


def decrypt_link(text, volume):
    if text.startswith("~"):
        reference = unbase64(text[1:], "link")
        with open(f"{volume.directory}/.kmsfs/links/{reference[:16].hex()}", "rb") as file:
            sealed = file.read(8192)
        target = unseal(volume.suite, volume.link_key, sealed[:24], sealed[24:], reference[:16], "link")
        if len(target) != int.from_bytes(reference[16:], "little"):
            raise Bad("link", "has another length than its symlink says")
        return target
    sealed = unbase64(text, "link")
    return unseal(volume.suite, volume.link_key, sealed[:24], sealed[24:], b"", "link")


# ---- the tree ----

def decrypt_directory(path, out, volume):
    """Decrypts the directory `path` into the new directory `out` (bytes), and yields what was refused."""
    os.mkdir(out)
    own_id = directory_id(path, volume)
    for entry in sorted(os.listdir(path)):
        if entry.startswith(".") or entry.startswith("~") and entry.endswith(".n"):
            continue
        source, target = f"{path}/{entry}", None
        try:
            target = os.path.join(out, decrypt_name(encrypted_name(path, entry), own_id, volume))
            print(os.fsdecode(target).encode(errors="replace").decode())
            yield from decrypt_entry(source, target, os.lstat(source), volume)
        except (Bad, OSError) as error:
            yield f"{source} ({os.fsdecode(target or b'?')}): {error}"


def decrypt_entry(source, target, info, volume):
    if stat.S_ISLNK(info.st_mode):
        os.symlink(decrypt_link(os.readlink(source), volume), target)
    elif stat.S_ISDIR(info.st_mode):
        yield from decrypt_directory(source, target, volume)
    elif stat.S_ISREG(info.st_mode):
        with open(source, "rb", opener=lambda p, f: os.open(p, f | os.O_NOFOLLOW)) as file:
            log = open_redo_log(file.fileno(), volume)
            copy_file(file.fileno() if log is None else log, target, volume)
            if log is not None:
                os.close(log)
    else:
        return print(f"{source}: a special file, left out", file=sys.stderr)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(target, stat.S_IMODE(info.st_mode))
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def copy_file(fd, target, volume):
    with open(target, "xb") as out:
        try:
            size, marked = decrypt_file(fd, volume, lambda data, at: os.pwrite(out.fileno(), data, at))
        except Bad:
            os.unlink(target)
            raise
        out.truncate(size)
    if not marked:
        print(f"{os.fsdecode(target)}: the end mark is missing: the file was cut off here", file=sys.stderr)


def open_keyring(path, passphrase):
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise Bad("keyring", f"{path} is not a regular file that only its owner may touch")
    with open(path, "rb") as file:
        return Keyring(file.read(1 << 18), passphrase)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("cipherdir")
    arguments.add_argument("outdir")
    arguments.add_argument("--keyring", help="instead of the one that the volume config names")
    arguments.add_argument("--passphrase-file")
    arguments = arguments.parse_args()
    read = lambda path, limit=1 << 18: open(path, "rb").read(limit)
    try:
        config_file = read(f"{arguments.cipherdir}/.kmsfs/volume.toml", 65537)
        keys = parse_config(config_file)[0]["wrapping-key"]
        places = [key.get("location") for key in keys if key["provider"] == "local"]
        passphrase = arguments.passphrase_file and read(arguments.passphrase_file).removesuffix(b"\n")
        if not (arguments.keyring or any(places)):
            raise Bad("keyring", "the volume names no local keyring: give --keyring")
        paths = [arguments.keyring] if arguments.keyring else list(filter(None, places))
        there = [path for path in paths if os.path.lexists(path)] or paths[:1]
        keyring = open_keyring(there[0], passphrase)
        for path in there[1:]:
            keyring.keys |= open_keyring(path, passphrase).keys
        root, out = arguments.cipherdir, os.fsencode(arguments.outdir)
        problems = list(decrypt_entry(root, out, os.stat(root), Volume(config_file, keyring, root)))
    except (Bad, OSError, ValueError, KeyError) as error:
        sys.exit(f"decrypt.py: {error}")
    for problem in problems:
        print(f"decrypt.py: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
