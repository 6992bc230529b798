"""In-session messages: golden bytes, sizes, and what a decoder may raise."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossedge.latency.report import Coordinates
from crossedge.meshd.inner import (
    PROBE_MIN,
    REPLY_MIN,
    Aeads,
    BlocklistAsk,
    BlocklistPart,
    Bye,
    Gso,
    Hello,
    Inner,
    Place,
    Probe,
    ProbeReply,
    Statement,
    decode,
    is_inner,
)
from crossedge.wire.errors import WireError

GOLDEN: list[tuple[Inner, str]] = [
    (
        Hello(0xA1B2C3D4, False, True, Aeads.AES_256_GCM | Aeads.CHACHA20_POLY1305, Gso(7), 65400),
        "01020010a1b2c3d4" + "01030700" + "0000ff78",
    ),
    (
        Hello(1, True, False, Aeads.CHACHA20_POLY1305, Gso(0), 1472),
        "0101001000000001" + "01020000" + "000005c0",
    ),
    (Probe(7, 1.5), "0200002200000007" + "0000000059682f00" + "00" * 18),
    (Probe(8, 0.0, size=72, full_reply=True), "0201002800000008" + "00" * 32),
    (
        ProbeReply(7, 1.5, 2.0, 2.25, 1232),
        "0300002200000007" + "0000000059682f00" + "0000000077359400" + "00000000861c4680" + "04d0",
    ),
    (Statement(b"rec", b"ce"), "0400001100000000" + "00030002" + "7265636365"),
    (
        Place(
            Coordinates((1.0, *(0.0,) * 7), 2.0, 0.5),
            ((b"\x07" * 16, Coordinates((0.0,) * 8, 0.25, 1.0)),),
        ),
        "0500006800000001"
        + ("3f800000" + "00" * 28 + "40000000" + "3f000000")
        + ("07" * 16 + "00" * 32 + "3e800000" + "3f800000"),
    ),
    (Bye(0x01020304), "0800000801020304"),
    (BlocklistAsk(0x1234, 1024), "0600001000000400" + "0000000000001234"),
    (
        BlocklistPart(0x1234, 2000, 1024, b"list"),
        "0700001800000400" + "0000000000001234000007d0" + "6c697374",
    ),
]


@pytest.mark.parametrize(("message", "expected"), GOLDEN, ids=lambda value: type(value).__name__)
def test_golden_bytes(message: Inner, expected: str) -> None:
    assert message.encode().hex() == expected
    assert decode(bytes.fromhex(expected)) == message


@pytest.mark.parametrize(("message", "expected"), GOLDEN, ids=lambda value: type(value).__name__)
def test_padding_of_wireguard_after_the_message_is_ignored(message: Inner, expected: str) -> None:
    decoded = decode(bytes.fromhex(expected) + bytes(5))
    assert type(decoded) is type(message)
    assert decoded.encode().startswith(bytes.fromhex(expected)[:2])


@pytest.mark.parametrize("size", [PROBE_MIN, 1232, 1452, 1472])
def test_probe_of_a_size_makes_a_datagram_of_that_size(size: int) -> None:
    assert len(Probe(1, 0.0, size=size).encode()) + 32 == size
    assert decode(Probe(1, 0.0, size=size).encode()) == Probe(1, 0.0, size=size)


def test_probe_is_never_answered_by_more_than_it_has() -> None:
    assert PROBE_MIN >= REPLY_MIN


def test_probe_reply_is_never_smaller_than_its_fields() -> None:
    assert len(ProbeReply(1, 0.0, 0.0, 0.0, 48, size=10).encode()) + 32 == REPLY_MIN


def test_packets_and_keepalives_are_not_in_session_messages() -> None:
    assert not is_inner(b"")
    assert not is_inner(b"\x45")
    assert not is_inner(b"\x60")
    assert is_inner(Probe(1, 0.0).encode())


@pytest.mark.parametrize(
    ("plaintext", "reason"),
    [
        ("02", "truncated"),
        ("0200001000000007", "bad-length"),
        ("0200001000000007" + "00" * 8, "short-probe"),
        ("020000080000000700000000", "truncated"),
        ("0200000000000007" + "00" * 8, "bad-length"),
        ("0500000800000000", "bad-length"),
        ("0500003000000001" + "00" * 40, "bad-length"),
        ("0500003000000009" + "00" * 40, "bad-length"),
        ("0500003000000000" + "7fc00000" * 10, "malformed"),
        ("0600000800000000", "truncated"),
        ("0700001000000000" + "00" * 8, "truncated"),
        ("0f00000800000000", "unknown-type"),
        ("0000000800000000", "unknown-type"),
        ("01000010a1b2c3d4" + "00030700" + "0000ff78", "bad-version"),
        ("0400001100000000" + "00040002" + "7265636365", "bad-length"),
        ("0400001100000000" + "ffffffff" + "7265636365", "bad-length"),
    ],
)
def test_bad_message_has_its_reason(plaintext: str, reason: str) -> None:
    with pytest.raises(WireError) as caught:
        decode(bytes.fromhex(plaintext))
    assert caught.value.reason == reason


def test_hello_of_a_later_version_keeps_what_is_known() -> None:
    later = bytes.fromhex("0180001400000001" + "09ffff55" + "0000ff78" + "01020304")
    hello = decode(later)
    assert isinstance(hello, Hello)
    assert hello.version == 9
    assert hello.aeads == Aeads(3)
    assert hello.gso == Gso(7)


@given(st.binary(max_size=64), st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]))
def test_only_wire_error_comes_out(tail: bytes, kind: int) -> None:
    with suppress(WireError):
        decode(bytes([kind]) + tail)
