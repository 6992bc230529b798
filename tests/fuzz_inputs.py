"""Bytes to try decoders with: golden vectors and live datagrams, changed where it hurts, and random ones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import msgpack

HERE = Path(__file__).parent
EDGES = (0, 1, 0x7F, 0x80, 0xFF)
LENGTHS = (0, 1, 0x7F, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF)
HUGE = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x91" * 500,
    b"\xdb\x7f\xff\xff\xff",
)
"""msgpack's lengths of 4 GiB, and its arrays in arrays."""


@cache
def golden() -> tuple[bytes, ...]:
    """Return the golden vectors: of messages, of signed objects, and WireGuard's transcripts."""
    found = [
        bytes.fromhex(line.split()[1])
        for name in ("wire_messages.hex", "wire_identity.hex")
        for line in (HERE / name).read_text().splitlines()
        if not line.startswith("#")
    ]
    found += _hexadecimal(json.loads((HERE / "vectors/wireguard_transcripts.json").read_text()))
    return tuple(found)


def _hexadecimal(value: Any) -> list[bytes]:
    if isinstance(value, dict):
        return [each for inner in value.values() for each in _hexadecimal(inner)]
    if isinstance(value, list):
        return [each for inner in value for each in _hexadecimal(inner)]
    try:
        return [bytes.fromhex(value)] if isinstance(value, str) and len(value) >= 32 else []
    except ValueError:
        return []


def mutated(seed: bytes, other: bytes, random: Random) -> bytes:
    """Return a seed with one to four changes: bits, bytes, lengths, cuts, copies, splices, msgpack values."""
    data = bytearray(seed)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data) + 1)
        way = random.randrange(9)
        if way == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif way == 1 and at < len(data):
            data[at] = random.choice(EDGES)
        elif way == 2 and at + 2 <= len(data):
            data[at : at + 2] = random.choice(LENGTHS).to_bytes(2, random.choice(("big", "little")))
        elif way == 3:
            del data[at:]
        elif way == 4:
            del data[at : at + random.randint(1, 16)]
        elif way == 5:
            data[at:at] = data[max(0, at - random.randint(1, 64)) : at] * random.randint(1, 8)
        elif way == 6:
            cut = random.randrange(len(other) + 1)
            data[at:] = other[cut:]
        elif way == 7:
            data[at:at] = random.choice(HUGE)
        else:
            data = bytearray(_packed_anew(bytes(data), random))
    return bytes(data)


def _packed_anew(data: bytes, random: Random) -> bytes:
    """Return msgpack with a value in it exchanged for another one; other bytes as they are."""
    try:
        content = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, RecursionError):
        return data
    values = (
        None,
        True,
        -1,
        0,
        2**64 - 1,
        1e308,
        float("nan"),
        "",
        "\ud7ff" * 9,
        b"",
        bytes(16),
        bytes(600),
        [],
        {},
        [[]] * 99,
    )
    value = random.choice(values)
    if isinstance(content, dict) and content:
        content[random.choice(list(content))] = value
    elif isinstance(content, list) and content:
        content[random.randrange(len(content))] = value
    else:
        content = value
    packed: bytes = msgpack.packb(content)
    return packed
