"""Small changes to valid files and texts, as damage and malice make them. A seed always gives the same change."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

__all__ = ["mutated_bytes", "mutated_json", "mutated_png", "mutated_safetensors", "mutated_text", "mutated_zip"]

Bytes = Callable[[random.Random, bytes], bytes]

# In the place of a number or a value of JSON; those beyond Python's digits are written out.
NUMBERS = ("-1", "0", "1e308", "1e999", "-0.0", "NaN", "Infinity", "4294967296", "9223372036854775807", "0.5", "true")
NUMBERS += ("18446744073709551616", "9" * 5000, "-" + "9" * 5000, "1" + "0" * 400, '"3"', "null", "[]", "{}")
DEEP = 50_000


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flipped bits, a part that is missing, doubled, or overwritten."""
    changed = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0 or not data:
        return bytes(changed[: rng.randrange(len(data) + 1)])
    at = rng.randrange(len(data))
    size = rng.choice((1, 2, 4, 8, 64))
    if kind in (1, 2):
        for _ in range(rng.choice((1, 1, 3, 10))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 3:
        del changed[at : at + size]
    elif kind == 4:
        changed[at:at] = changed[at : at + size] * rng.choice((1, 2, 100))
    else:
        changed[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f")) * size
    return bytes(changed)


def mutated_text(rng: random.Random, text: str) -> str:
    """A number that cannot be meant, brackets in brackets, doubled or missing parts; or changed bytes."""
    kind = rng.randrange(6)
    numbers = list(re.finditer(r"-?\d+(\.\d+)?", text))
    if kind < 2 and numbers:
        match = rng.choice(numbers)
        return text[: match.start()] + rng.choice(NUMBERS) + text[match.end() :]
    at = rng.randrange(len(text) + 1)
    if kind == 2:
        bracket = rng.choice("([{")
        return text[:at] + bracket * rng.choice((1, 3, DEEP)) + text[at:]
    if kind == 3:
        return text[:at] + text[at + rng.choice((1, 5)) :]
    if kind == 4:
        return (
            text[:at] + rng.choice(("\0", "\ud800", "é", "\u202e", "\n", '"', "'", "a" * 5000, ",,", "=")) + text[at:]
        )
    return mutated_bytes(rng, text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")


def mutated_json(rng: random.Random, text: bytes) -> bytes:
    """A value in it replaced, removed or nested; or changed as any text is."""
    if rng.random() < 0.3:
        return mutated_text(rng, text.decode("utf-8", "replace")).encode("utf-8", "replace")
    try:
        document = json.loads(text)
    except ValueError:
        return mutated_bytes(rng, text)
    marker = "\x01replaced\x01"
    places = list(_places(document))
    if not places:
        return rng.choice(NUMBERS).encode()
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    replacement = rng.choice(NUMBERS)
    if kind == 0:
        del holder[key]
        return json.dumps(document).encode()
    if kind == 1:
        depth = rng.choice((2, DEEP))
        replacement = "[" * depth + "]" * depth
    elif kind == 2 and isinstance(holder, dict):
        holder[str(key) + "2"] = holder[key]
    holder[key] = marker
    return json.dumps(document).replace(json.dumps(marker), replacement).encode()


def _places(document: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in pairs:
        found.append((document, key))
        found += _places(value)
    return found


def mutated_png(rng: random.Random, data: bytes) -> bytes:
    """Another size in its header, whose checksum fits; or any bytes."""
    if rng.random() < 0.6:
        return mutated_bytes(rng, data)
    sizes = (0, 1, 9_000, 13_000, 30_000, 60_000, 2**31 - 1, 2**32 - 1)
    header = struct.pack(">II", rng.choice(sizes), rng.choice(sizes)) + data[24:29]
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


def mutated_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Its header changed as JSON and the JSON within it, its lengths, or any bytes."""
    kind = rng.randrange(5)
    if kind == 0:
        return mutated_bytes(rng, data)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    if kind == 1:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1))) + data[8:]
    if kind == 2:
        header = _mutated_metadata(rng, header)
    elif kind == 3:
        names = (b"F4", b"F6_E2M3", b"F8_E8M0", b"C64", b"BOOL", b"U64", b"F16", b"F64", b"I64")
        header = re.sub(rb'"dtype":\s*"\w+"', b'"dtype":"' + rng.choice(names) + b'"', header, count=rng.choice((0, 1)))
    else:
        header = mutated_json(rng, header)
    return struct.pack("<Q", len(header)) + header + body


def _mutated_metadata(rng: random.Random, header: bytes) -> bytes:
    document = json.loads(header)
    texts = document.get("__metadata__") or {"format": "pt"}
    key = rng.choice(sorted(texts))
    texts[key] = mutated_json(rng, texts[key].encode()).decode("utf-8", "replace")
    return json.dumps({**document, "__metadata__": texts}).encode()


def mutated_zip(member: Bytes) -> Bytes:
    """Changes one member of an archive, whose checksums then fit; or the archive's own bytes."""

    def function(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.3:
            return mutated_bytes(rng, data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        changed = rng.choice(sorted(members))
        members[changed] = member(rng, members[changed])
        if rng.random() < 0.2:
            members.pop(rng.choice(sorted(members)))
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return file.getvalue()

    return function
