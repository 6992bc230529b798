"""Telling datagrams apart, and the relay header."""

from __future__ import annotations

import pytest

from crossedge.wire.demux import Kind, classify
from crossedge.wire.errors import WireError
from crossedge.wire.relay import HEADER, pack_header, unpack_header

FIRST_BYTES = {
    "01000000": Kind.INITIATION,
    "02000000": Kind.RESPONSE,
    "03000000": Kind.COOKIE,
    "04000000": Kind.TRANSPORT,
    "000100002112a442": Kind.STUN,
    "010100002112a442": Kind.STUN,
    "011100002112a442": Kind.STUN,
    "ce010100": Kind.CONTROL,
    "ce010200": Kind.CONTROL,
    "ce020000": Kind.RELAY,
    "ce030000": Kind.CHUNK,
    "00000000": Kind.UNKNOWN,
    "05000000": Kind.UNKNOWN,
    "01000001": Kind.UNKNOWN,
    "04000100": Kind.UNKNOWN,
    "000100002112a443": Kind.UNKNOWN,
    "001100002112a442": Kind.UNKNOWN,  # a Binding indication is of no use here
    "ce000000": Kind.UNKNOWN,
    "ce040000": Kind.UNKNOWN,
    "60000000": Kind.UNKNOWN,
}


@pytest.mark.parametrize(("first", "kind"), FIRST_BYTES.items())
def test_first_bytes_tell(first: str, kind: Kind) -> None:
    datagram = bytes.fromhex(first).ljust(32, b"\0")
    assert classify(datagram) is kind
    assert classify(memoryview(bytearray(datagram))) is kind


@pytest.mark.parametrize(("first", "kind"), FIRST_BYTES.items())
def test_segment_of_a_train_is_told_where_it_stands(first: str, kind: Kind) -> None:
    segment = bytes.fromhex(first).ljust(32, b"\0")
    train = b"\x04\0\0\0".ljust(32, b"\0") + segment
    assert classify(train, 32) is kind
    assert classify(train, 32, 64) is kind


def test_short_datagrams_are_unknown() -> None:
    for size in range(8):
        assert classify(b"\x04\0\0\0\0\0\0\0"[:size]) is Kind.UNKNOWN
    assert classify(b"\x04\0\0\0".ljust(64, b"\0"), 0, 7) is Kind.UNKNOWN
    assert classify(b"\x04\0\0\0".ljust(64, b"\0"), 60) is Kind.UNKNOWN


def test_golden_relay_header() -> None:
    assert pack_header(0xABCDEF012345).hex() == "ce02abcdef012345"
    assert unpack_header(b"xx" + bytes.fromhex("ce02abcdef012345") + b"payload", 2) == 0xABCDEF012345
    assert len(pack_header(0)) == HEADER


@pytest.mark.parametrize("wrong", ["", "ce02abcdef0123", "ce03abcdef012345", "00ce02abcdef0123"])
def test_what_is_no_relay_header(wrong: str) -> None:
    with pytest.raises(WireError):
        unpack_header(bytes.fromhex(wrong))


@pytest.mark.parametrize("channel", [-1, 1 << 48])
def test_channel_has_48_bits(channel: int) -> None:
    with pytest.raises(ValueError, match="not a channel"):
        pack_header(channel)
