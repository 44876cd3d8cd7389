#!/usr/bin/env python3
"""Makes the test vectors in this directory with the Python reading of docs/FORMAT.md.

Every case is one TOML file: what it is, the word that a reader must answer, and its inputs; binary fields are base64.
The cases are committed; this is how they were made. Everything is derived from the case's name, so that a second run gives the
same files.
"""
import base64, hashlib, hmac, pathlib, struct, sys, uuid

HERE = pathlib.Path(__file__).parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(HERE.parent.parent / "scripts"))
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from decrypt import (PAGE, PAYLOAD, SLOT, MAX_PLAIN, SUITES, XAES, XCHACHA, Bad, Keyring, Volume, aead, base64url, context,
                     decrypt_link, decrypt_name, file_key, hkdf, open_page, plain_size)

NAMES = {number: name for name, number in SUITES.items()}


def fixed(label, length):
    """Bytes that look random and are the same every time."""
    return hashlib.shake_256(label.encode()).digest(length)


def seal(suite, key, nonce, plain, associated):
    box, nonce = aead(suite, key, nonce)
    return box.encrypt(nonce, plain, associated)


def flip(data, at, bit=1):
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1:]


def put(data, at, new):
    return data[:at] + new + data[at + len(new):]


# ---- writers ----

VOLUME_ID, VOLUME_KEY = fixed("volume id", 16), fixed("volume key", 32)
FILE_ID, DATA_KEY, DATA_KEY_ID = fixed("file id", 32), fixed("data key", 32), fixed("data key id", 16)
DIRECTORY = fixed("directory id", 16)
KEY_ID = "k-0123456789abcdef"


def label(name, length=32):
    return hkdf(VOLUME_KEY, VOLUME_ID, b"kmsfs v1 " + name, length)


def mac(key, data):
    return hmac.digest(key, data, "sha256")


def content_key(suite):
    return hkdf(DATA_KEY, FILE_ID, b"kmsfs v1 content" + bytes([suite]))


def page(suite, index, plain, last=True, length=None, nonce=None, flags=None, reserved=0):
    flags = (1 if last else 0) if flags is None else flags
    trailer = struct.pack("<HHI", length if length is not None else len(plain), flags, reserved)
    nonce = nonce or fixed(f"nonce {index}", 24)
    sealed = seal(suite, content_key(suite), nonce, plain.ljust(PAYLOAD, b"\0"), struct.pack("<Q", index) + trailer)
    return nonce + sealed[:PAYLOAD] + trailer + sealed[PAYLOAD:]


def record(tag=1, key_id=KEY_ID.encode(), wrapped=None):
    wrapped = fixed("wrapped", 77) if wrapped is None else wrapped
    return struct.pack("<BH", tag, len(key_id)) + key_id + struct.pack("<H", len(wrapped)) + wrapped


def slot(suite=XAES, generation=1, records=None, count=None, version=1, flags=0, magic=b"KMSFS", volume_id=VOLUME_ID,
         file_id=FILE_ID, commitment=None, key=None):
    records = [record()] if records is None else records
    commitment = commitment or hkdf(DATA_KEY, file_id, b"kmsfs v1 commit")
    signed = (magic + struct.pack("<BBBQ", version, suite, flags, generation) + volume_id + file_id + DATA_KEY_ID
              + bytes([len(records) if count is None else count]) + b"".join(records) + commitment)
    return (signed + mac(key or label(b"header"), signed)).ljust(SLOT, b"\0")


def config(sealed_with=None, **changes):
    fields = {"format": 1, "volume-id": str(uuid.UUID(bytes=VOLUME_ID)), "suite": "xaes-256-gcm", "holes": "allow",
              "end": "lenient", "files-per-data-key": 1} | changes
    text = "# A kmsfs volume. The seal at the end authenticates every byte above it: do not edit.\n"
    text += "".join(f"{k} = {v if isinstance(v, int) else chr(34) + v + chr(34)}\n" for k, v in fields.items() if v is not None)
    text += f'\n[[wrapping-key]]\nprovider = "local"\nkey = "{KEY_ID}"\nlocation = "/keys/ring"\n'
    text += f'\n[[volume-key]]\nprovider = "local"\nkey = "{KEY_ID}"\nwrapped = "AAAA"\n'
    return seal_config(text, sealed_with)


def seal_config(body, key=None):
    return f'{body}\n[seal]\nmac = "{mac(key or label(b"config"), body.encode()).hex()}"\n'


def sealed_name(name, directory=DIRECTORY):
    return AESSIV(label(b"name", 64)).encrypt(name, [directory])


def long_entry(text):
    return "~" + base64url(hashlib.sha256(text.encode()).digest())


# ---- the cases ----

class Fake:
    """A volume and a provider that answer what the case says."""

    def __init__(self, data_key=DATA_KEY, allowed=(KEY_ID,)):
        self.id, self.uuid, self.header_key = VOLUME_ID, str(uuid.UUID(bytes=VOLUME_ID)), label(b"header")
        self.names, self.link_key, self.suite = AESSIV(label(b"name", 64)), label(b"link"), XAES
        self.allowed, self.keyring, self.answer = {a.encode() for a in allowed}, self, data_key

    def unwrap_any(self, copies, bound):
        return self.answer


def case(name, what, kind, expect, read, **fields):
    """Writes a case, after `read` has answered as expected."""
    try:
        answer = read()
        word = "ok"
    except Bad as error:
        word = error.word
    assert word == expect, f"{name}: {word} instead of {expect}"
    if expect == "ok" and answer is not None:
        fields["answer"] = answer
    lines = [f"# {what}", f'kind = "{kind}"', f'expect = "{expect}"']
    for key, value in fields.items():
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, bytes):
            value = f'"{base64.b64encode(value).decode()}"'
        elif isinstance(value, str):
            value = "'''\n" + value + "'''" if "\n" in value else f'"{value}"'
        lines.append(f"{key.replace('_', '-')} = {value}")
    (HERE / f"{name}.toml").write_text("\n".join(lines) + "\n")


def header_case(name, what, expect, a=bytes(SLOT), b=bytes(SLOT), data_key=DATA_KEY):
    def read():
        suite, key = file_key(a + b, Fake(data_key))
        return seal(suite, key, bytes(24), b"probe", b"")
    case(f"header-{name}", what, "header", expect, read,
         volume_id=VOLUME_ID, volume_key=VOLUME_KEY, data_key=data_key, key_id=KEY_ID, header=a + b)


def headers():
    good, newer = slot(), slot(generation=2, records=[record(), record(wrapped=b"another")])
    header_case("good", "One record, slot A.", "ok", good)
    header_case("good-xchacha20-poly1305", "The other suite.", "ok", slot(suite=XCHACHA))
    header_case("slot-b", "Slot A was never written.", "ok", b=good)
    header_case("torn-a", "Slot A is torn: slot B counts.", "ok", flip(newer, 300), good)
    header_case("newer-b", "Both slots are whole; the one that counts has the other suite.", "ok", good, slot(suite=XCHACHA, generation=2))
    header_case("newer-a", "Both slots are whole and A is the newer one.", "ok", slot(suite=XCHACHA, generation=2**63), good)
    header_case("unknown-provider", "A record of a provider that does not exist yet comes first.", "ok",
                slot(records=[record(tag=200, key_id=b"?", wrapped=b""), record()]))
    header_case("full", "The records fill the slot to its last byte.", "ok",
                slot(records=[record(), record(tag=9, wrapped=bytes(1903 - len(record()) - 5 - len(KEY_ID)))]))
    header_case("magic", "The magic is wrong.", "not a header", slot(magic=b"KMSFT"))
    header_case("version-0", "Version 0.", "unknown version", slot(version=0))
    header_case("version-2", "Version 2.", "unknown version", slot(version=2))
    header_case("flags", "A flag of a later version.", "unknown flags", slot(flags=1))
    header_case("no-records", "No record.", "malformed", slot(records=[]))
    header_case("count-too-large", "More records than there are.", "malformed", slot(count=255))
    header_case("count-too-small", "Fewer records than there are.", "malformed", slot(records=[record(), record()], count=1))
    header_case("wrapped-length", "A wrapped key that ends past the slot.", "malformed", put(good, 81 + 1 + 2 + len(KEY_ID), b"\xff\xff"))
    header_case("key-id-length", "A key id that ends past the slot.", "malformed", put(good, 82, b"\xff\xff"))
    header_case("trailing", "A byte after the MAC.", "malformed", put(good, SLOT - 1, b"\1"))
    header_case("mac", "One bit of the MAC.", "header mac", flip(good, 81 + len(record()) + 32))
    header_case("changed-suite", "The suite was changed to the other one.", "header mac", put(good, 6, bytes([XCHACHA])))
    for at, field in ((8, "generation"), (16, "volume-id"), (32, "file-id"), (64, "data-key-id"), (120, "wrapped"),
                      (81 + len(record()), "commitment")):
        header_case(f"changed-{field}", f"One bit of the {field} was changed.", "header mac", flip(good, at, 2))
    header_case("other-volume", "Made under another volume's header key.", "header mac", slot(key=fixed("another", 32)))
    header_case("other-volume-id", "The right key, and the id of another volume.", "header mac", slot(volume_id=fixed("another", 16)))
    header_case("suite-unknown", "A suite that does not exist.", "unknown suite", slot(suite=3))
    header_case("key-not-allowed", "The wrapping key is not on the volume's list.", "no usable record",
                slot(records=[record(key_id=b"k-ffffffffffffffff")]))
    header_case("provider-not-known", "Only a record of a provider that does not exist yet.", "no usable record", slot(records=[record(tag=200)]))
    header_case("commitment", "The provider answers another data key.", "commitment", good, data_key=fixed("another", 32))
    header_case("commitment-stored", "The header commits to another data key.", "commitment", slot(commitment=fixed("another", 32)))
    header_case("both-broken", "Slot A has a broken MAC, slot B another version.", "header mac", flip(good, 40), slot(version=2))


def file_case(name, what, expect, pages, disk_size, suite=XAES, holes="allow", end="lenient"):
    """A file after its header page: its pages and its size on disk."""
    def read():
        get = lambda i: open_page(pages[i * PAGE:(i + 1) * PAGE].ljust(PAGE, b"\0"), i, suite, content_key(suite), holes == "allow")
        size = plain_size(disk_size, lambda i: get(i)[1])
        plain, marked = b"", True
        for i in range(-(-size // PAYLOAD)):
            payload, _, marked = get(i)
            plain += payload or bytes(PAYLOAD)
        if size and not marked and end == "strict":
            raise Bad("end mark")
        return hashlib.sha256(plain[:size]).digest() + struct.pack("<Q", size)
    case(f"file-{name}", what, "file", expect, read, suite=NAMES[suite], holes=holes, end=end, data_key=DATA_KEY, file_id=FILE_ID,
         disk_size=disk_size, pages=pages)


def files():
    text = fixed("content", 3 * PAYLOAD)
    full, part = text[:PAYLOAD], text[PAYLOAD:PAYLOAD + 1000]
    for suite in XAES, XCHACHA:
        first, last = page(suite, 0, full, last=False), page(suite, 1, part)
        run = lambda name, *rest, **more: file_case(f"{name}-{NAMES[suite]}", *rest, suite=suite, **more)
        run("settled", "Two pages, settled.", "ok", first + last, 12288 + 1000)
        run("unsettled", "Two pages, unsettled.", "ok", first + last, 12288)
        run("bit-ciphertext", "One bit of the ciphertext.", "page", flip(first, 2000) + last, 12288)
        run("bit-tag", "One bit of the tag.", "page", flip(first, 4090) + last, 12288)
        run("bit-nonce-prefix", "One bit of the nonce's first half.", "page", flip(first, 3) + last, 12288)
        run("bit-nonce-suffix", "One bit of the nonce's second half.", "page", flip(first, 20) + last, 12288)
        run("swapped", "Two pages changed places.", "page", last + first, 12288)
        run("other-suite", "Sealed under the other suite.", "page", page(3 - suite, 0, full), 8192)
    first, last = page(XAES, 0, full, last=False), page(XAES, 1, part)
    file_case("empty", "Only a header.", "ok", b"", 4096)
    file_case("one-byte", "One byte, settled.", "ok", page(XAES, 0, b"x"), 8193)
    file_case("full-page", "One whole page.", "ok", page(XAES, 0, full), 8192)
    file_case("settled-4047", "The largest remainder.", "ok", page(XAES, 0, full[:4047]), 8192 + 4047)
    file_case("stale-last", "An inner page says that it was the last one, with a length.", "ok",
              page(XAES, 0, full, last=True, length=700) + last, 12288)
    file_case("settled-disagrees", "Settled, and the last page's length is another: the disk size counts.", "ok",
              page(XAES, 0, full, length=9), 8192 + 2000)
    file_case("shrunk", "Bytes past the length of the last page are not part of the file.", "ok", page(XAES, 0, full, length=100), 8192)
    file_case("hole-inside", "A hole between two pages.", "ok", first + bytes(PAGE) + page(XAES, 2, part), 16384)
    file_case("hole-last-settled", "Grown by truncate: the last page is a hole, the disk size tells the size.", "ok", first + bytes(PAGE), 12288 + 77)
    file_case("hole-last", "A hole at the end counts whole.", "ok", first + bytes(PAGE), 12288)
    file_case("hole-denied", "A hole in a volume that has none.", "hole", first + bytes(PAGE) + page(XAES, 2, part), 16384, holes="deny")
    file_case("no-end-mark", "Cut at a page boundary, lenient.", "ok", first, 8192)
    file_case("no-end-mark-strict", "Cut at a page boundary, strict.", "end mark", first, 8192, end="strict")
    file_case("end-mark-strict", "Whole, strict.", "ok", first + last, 12288, end="strict")
    file_case("length-changed", "The length in the trailer was changed.", "page", put(page(XAES, 0, part), 4072, struct.pack("<H", 999)), 8192)
    file_case("last-added", "The end mark was set by somebody else.", "page", put(first, 4074, b"\1"), 8192, end="strict")
    file_case("trailer-length-0", "Sealed with length 0.", "trailer", page(XAES, 0, part, length=0), 8192)
    file_case("trailer-length-4049", "Sealed with a length beyond the page.", "trailer", page(XAES, 0, part, length=4049), 8192)
    file_case("trailer-flag", "Sealed with an unknown flag.", "trailer", page(XAES, 0, part, flags=3), 8192)
    file_case("trailer-reserved", "Sealed with a reserved bit.", "trailer", page(XAES, 0, part, reserved=1 << 31), 8192)
    file_case("nearly-a-hole", "A page of zeros but for its last byte.", "page", bytes(PAGE - 1) + b"\1", 8192)
    for size in 1, 4095, 4097, 8191, 8192 + 4048, 8192 + 4095:
        file_case(f"size-{size}", "No plain size has this disk size.", "impossible size", page(XAES, 0, full)[:max(0, size - PAGE)], size)


def sizes():
    """Sizes that no test would like to store: arithmetic only; `len` is what the last page says."""
    def size_case(disk, length, expect="ok"):
        what = "The disk size of a plain size." if expect == "ok" else "No plain size has this disk size."
        case(f"size-{disk}", what, "size", expect, lambda: str(plain_size(disk, lambda _: length)), disk_size=str(disk), len=length)
    biggest = PAGE * (1 + MAX_PLAIN // PAYLOAD)
    for disk, length in (0, 1), (4096, 1), (8193, 1), (8192, 17), (2**40, 4048), (2**40 + 4047, 1), (biggest, 4048), (biggest + 1, 1), (biggest + 4047, 1):
        size_case(disk, length)
    for disk in biggest + 4048, biggest + 4096, 2**40 + 4048, 2**63 - 1, 2**64 - 1:
        size_case(disk, 4048, "impossible size")


def names():
    def name_case(name, what, expect, text, directory=DIRECTORY):
        case(f"name-{name}", what, "name", expect, lambda: decrypt_name(text, directory, Fake()),
             volume_id=VOLUME_ID, volume_key=VOLUME_KEY, directory=directory, text=text)
    good = base64url(sealed_name(b"letter.txt"))
    name_case("good", "A name.", "ok", good)
    name_case("one-byte", "The shortest name.", "ok", base64url(sealed_name(b"x")))
    name_case("255-bytes", "The longest name.", "ok", base64url(sealed_name(b"n" * 255)))
    name_case("not-utf8", "Names are bytes.", "ok", base64url(sealed_name(b"\xff\xfe\x01")))
    name_case("other-directory", "The name of an entry in another directory.", "name", good, fixed("another", 16))
    name_case("bit", "One bit.", "name", base64url(flip(sealed_name(b"letter.txt"), 5)))
    name_case("cut", "The last byte is missing.", "name", base64url(sealed_name(b"letter.txt")[:-1]))
    name_case("padding", "With padding.", "name", good + "=" * (-len(good) % 4 or 4))
    name_case("alphabet", "The alphabet of the other base64.", "name", base64.b64encode(fixed("+/", 26)).decode().rstrip("=")[:-2] + "+/")
    name_case("unused-bits", "Bits that no byte has are not zero.", "name", good[:-1] + chr(ord(good[-1]) + 1))
    name_case("short", "Shorter than its own tag.", "name", base64url(fixed("short", 15)))
    name_case("empty", "An authentic empty name.", "no name", base64url(siv_empty()))
    for name, plain in ("dot", b"."), ("dotdot", b".."), ("slash", b"a/b"), ("nul", b"a\0b"), ("256-bytes", b"n" * 256):
        name_case(name, f"An authentic name that no directory can have: {name}.", "no name", base64url(sealed_name(plain)))


def siv_empty():
    """AES-SIV of an empty name, which the library refuses to make: S2V over one string and an empty one, RFC 5297."""
    from cryptography.hazmat.primitives.ciphers import algorithms
    from cryptography.hazmat.primitives.cmac import CMAC

    def cmac(data):
        c = CMAC(algorithms.AES256(label(b"name", 64)[:32]))
        c.update(data)
        return c.finalize()

    double = lambda block: ((int.from_bytes(block) << 1 ^ (0x87 if block[0] >> 7 else 0)) & (1 << 128) - 1).to_bytes(16)
    xor = lambda a, b: bytes(x ^ y for x, y in zip(a, b))
    d = xor(double(cmac(bytes(16))), cmac(DIRECTORY))
    return cmac(xor(double(d), b"\x80" + bytes(15)))


def directories():
    def directory_case(name, what, expect, target):
        from decrypt import check_mac, unbase64

        def read():
            signed = unbase64(target, "directory id")
            check_mac(label(b"directory"), signed[:16], signed[16:] if len(signed) == 32 else b"\0", "directory id")
            return signed[:16]
        case(f"directory-{name}", what, "directory", expect, read, volume_id=VOLUME_ID, volume_key=VOLUME_KEY, target=target)
    signed = DIRECTORY + mac(label(b"directory"), DIRECTORY)[:16]
    directory_case("good", "A directory id.", "ok", base64url(signed))
    directory_case("id", "One bit of the id.", "directory id", base64url(flip(signed, 0)))
    directory_case("mac", "One bit of the MAC.", "directory id", base64url(flip(signed, 31)))
    directory_case("short", "A MAC of 15 bytes.", "directory id", base64url(signed[:31]))
    directory_case("long", "A MAC of 17 bytes.", "directory id", base64url(DIRECTORY + mac(label(b"directory"), DIRECTORY)[:17]))
    directory_case("empty", "Nothing.", "directory id", "")
    directory_case("padding", "With padding.", "directory id", base64url(signed) + "=")


def links():
    def link_case(name, what, expect, text, suite=XAES):
        fake = Fake()
        fake.suite = suite
        case(f"link-{name}", what, "link", expect, lambda: decrypt_link(text, fake), suite=NAMES[suite], volume_id=VOLUME_ID,
             volume_key=VOLUME_KEY, text=text)
    for suite in XAES, XCHACHA:
        nonce = fixed(f"link nonce {suite}", 24)
        sealed = nonce + seal(suite, label(b"link"), nonce, b"../over/there", b"")
        link_case(f"good-{NAMES[suite]}", "A target.", "ok", base64url(sealed), suite)
        link_case(f"bit-{NAMES[suite]}", "One bit.", "link", base64url(flip(sealed, 30)), suite)
        link_case(f"other-suite-{NAMES[suite]}", "The other suite.", "link", base64url(sealed), 3 - suite)
    link_case("short", "Shorter than nonce and tag.", "link", base64url(fixed("link", 39)))
    link_case("padding", "With padding.", "link", base64url(fixed("link", 53)) + "=")


def configs():
    def config_case(name, what, expect, text):
        class Ring:
            unwrap_any = staticmethod(lambda copies, bound: VOLUME_KEY)
        case(f"config-{name}", what, "config", expect, lambda: Volume(text.encode(), Ring).id and None, volume_key=VOLUME_KEY, file=text)
    good = config()
    config_case("good", "A config.", "ok", good)
    config_case("good-strict", "Every other value.", "ok",
                config(suite="xchacha20-poly1305", holes="deny", end="strict", **{"files-per-data-key": 1000000}))
    config_case("downgraded", "A rule was changed.", "seal", config(holes="deny").replace("deny", "allow"))
    config_case("key-added", "A wrapping key was added.", "seal",
                good.replace("[[volume-key]]", '[[wrapping-key]]\nprovider = "local"\nkey = "k-ffffffffffffffff"\n\n[[volume-key]]'))
    config_case("comment", "Only a comment was changed.", "seal", good.replace("do not edit", "do edit"))
    config_case("mac", "One digit of the seal.", "seal", good[:-4] + ("0" if good[-4] != "0" else "1") + good[-3:])
    config_case("other-key", "Sealed under another key.", "seal", config(sealed_with=fixed("another", 32)))
    config_case("no-seal", "The seal is missing.", "no seal", good.split("\n[seal]")[0])
    config_case("after-seal", "Something after the seal.", "no seal", good + "\n")
    config_case("seal-upper-case", "The seal in capitals.", "no seal", good[:-67] + good[-67:].upper())
    config_case("seal-short", "A seal of 31 bytes.", "no seal", good[:-4] + good[-2:])
    config_case("version-2", "Version 2.", "unknown version", config(format=2))
    config_case("no-version", "No version.", "malformed", config(format=None))
    config_case("unknown-field", "A field of a later version.", "malformed", config(more=1))
    config_case("missing-field", "A field is missing.", "malformed", config(holes=None))
    config_case("suite", "A suite that does not exist.", "unknown suite", config(suite="null"))
    config_case("holes", "A rule that does not exist.", "malformed", config(holes="maybe"))
    config_case("volume-id", "The volume id is in capitals.", "malformed", config(**{"volume-id": str(uuid.UUID(bytes=VOLUME_ID)).upper()}))
    config_case("files-per-data-key-0", "No files for a data key.", "malformed", config(**{"files-per-data-key": 0}))
    config_case("files-per-data-key-large", "Too many files for a data key.", "malformed", config(**{"files-per-data-key": 1000001}))
    config_case("no-wrapping-key", "No wrapping key.", "malformed", seal_config(good.split("\n[seal]")[0].replace("[[wrapping-key]]", "[[ignored]]")))
    config_case("toml", "Not TOML.", "malformed", seal_config(good.split("\n[seal]")[0] + "=\n"))


def wrapped_keys():
    material = fixed("wrapping key", 32)
    keyring = (f'# A kmsfs keyring. Whoever reads this file has its keys; without it what they wrap is lost.\nformat = 1\n\n[[key]]\nid = "{KEY_ID}"\n'
               f'state = "enabled"\ncreated = 1700000000\n\n[[key.version]]\nnumber = 7\nmaterial = "{base64.b64encode(material).decode()}"\n')
    bound = context(data_key=str(uuid.UUID(bytes=DATA_KEY_ID)), volume=str(uuid.UUID(bytes=VOLUME_ID)))

    def wrap(head=b"\1\7\0\0\0", key_id=KEY_ID, bound=bound, plain=DATA_KEY):
        nonce = fixed("wrapping nonce", 24)
        associated = head + struct.pack("<H", len(key_id)) + key_id.encode() + bound
        return head + nonce + seal(XAES, material, nonce, plain, associated)

    def wrapped_case(name, what, expect, wrapped, ring=keyring):
        case(f"wrapped-{name}", what, "wrapped", expect, lambda: Keyring(ring.encode()).unwrap(KEY_ID, wrapped, bound), volume_id=VOLUME_ID,
             data_key_id=DATA_KEY_ID, key_id=KEY_ID, keyring=ring, wrapped=wrapped)
    wrapped_case("good", "A data key.", "ok", wrap())
    wrapped_case("bit", "One bit.", "wrapped key", flip(wrap(), 40))
    wrapped_case("version", "Another layout.", "wrapped key", wrap(b"\2\7\0\0\0"))
    wrapped_case("key-version", "A version that the keyring does not have.", "no such key", wrap(b"\1\6\0\0\0"))
    wrapped_case("key-id", "Wrapped under the same key with another id.", "wrapped key", wrap(key_id="k-ffffffffffffffff"))
    wrapped_case("context", "Wrapped for another data key.", "wrapped key",
                 wrap(bound=context(data_key=str(uuid.UUID(int=0)), volume=str(uuid.UUID(bytes=VOLUME_ID)))))
    wrapped_case("purpose", "A wrapped volume key.", "wrapped key", wrap(bound=context(purpose="volume", volume=str(uuid.UUID(bytes=VOLUME_ID)))))
    wrapped_case("31-bytes", "A data key of 31 bytes.", "wrapped key", wrap(plain=DATA_KEY[:31]))
    wrapped_case("disabled", "The key is disabled.", "key disabled", wrap(), keyring.replace("enabled", "disabled"))


if __name__ == "__main__":
    for old in HERE.glob("*.toml"):
        old.unlink()
    for make in headers, files, sizes, names, directories, links, configs, wrapped_keys:
        make()
    print(len(list(HERE.glob("*.toml"))), "cases")
