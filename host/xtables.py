"""The FORWARD chain of the iptables that came before nftables, read from the kernel.

    struct xt_getinfo:     name 32 | valid hooks u32 | entry u32 x 5 | underflow u32 x 5 | entries u32 | size
    u32 struct xt_get_entries: name 32 | size u32 | padding 4 | entries entry:                 match (84 bytes
    IPv4, 136 IPv6) | cache u32 | target offset u16 | next offset u16 | ... standard target:       size u16 |
    name 29 | revision u8 | verdict i32

The entry at the underflow of a hook is the policy of its chain.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from crossedge.host.netlink import Network

DROP = -1
ACCEPT = -2
"""Verdicts, as -1 - NF_*."""
FORWARD = 2
GET_INFO = 64
GET_ENTRIES = 65
INFO = struct.Struct("=32s13I")
ENTRIES_HEAD = 40
OFFSETS = struct.Struct("=HH")
PROTOCOL = struct.Struct("=H")
VERDICT = struct.Struct("=i")
TARGET_NAME = struct.Struct("=2x29s")
ENTRIES_LIMIT = 1 << 20
"""Largest table that is read, in bytes."""

_libc = ctypes.CDLL(None, use_errno=True)


class Rule(NamedTuple):
    """A rule of interfaces and addresses alone: what it matches, and whether it accepts."""

    input: str
    output: str
    source: Network | None
    """None: any."""
    to: Network | None
    accept: bool


class Chain(NamedTuple):
    """The FORWARD chain's policy, and the plain rules of all chains of its table."""

    policy: int
    rules: list[Rule]


class _Layout(NamedTuple):
    version: int
    family: int
    level: int
    names: str
    match: int
    """Bytes of the match; the target and next offsets stand four bytes behind it."""
    address: int
    protocol: int
    """Where in the match the protocol stands, and the flags that turn its parts round."""
    inverted: int
    head: int
    """Bytes before the extensions or, without any, the target."""


IPV4 = _Layout(4, socket.AF_INET, socket.IPPROTO_IP, "ip_tables_names", 84, 4, 80, 83, 112)
IPV6 = _Layout(6, socket.AF_INET6, socket.IPPROTO_IPV6, "ip6_tables_names", 136, 16, 128, 132, 168)


def forward_chain(version: int) -> Chain | None:
    """Return the FORWARD chain of the old iptables; None where it is not in use, or cannot be read.

    The table is not touched where it does not exist: asking for it would make it.
    """
    layout = IPV4 if version == 4 else IPV6
    try:
        names = (Path("/proc/thread-self/net") / layout.names).read_text().split()
    except OSError:
        return None
    if "filter" not in names:
        return None
    try:
        with socket.socket(
            layout.family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW
        ) as opened:
            info = _getsockopt(opened, layout.level, GET_INFO, b"filter".ljust(INFO.size, b"\0"))
            _, _, *hooks, _, size = INFO.unpack(info)
            if size > ENTRIES_LIMIT:
                return None
            request = struct.pack("=32sI4x", b"filter", size) + bytes(size)
            entries = _getsockopt(opened, layout.level, GET_ENTRIES, request)[ENTRIES_HEAD:]
        return parse_entries(entries, hooks[5 + FORWARD], layout)
    except (OSError, struct.error):
        return None


def _getsockopt(opened: socket.socket, level: int, option: int, request: bytes) -> bytes:
    """Call getsockopt with a buffer that says what is asked for, as Python's own cannot."""
    buffer = ctypes.create_string_buffer(request, len(request))
    length = ctypes.c_uint32(len(request))
    if _libc.getsockopt(opened.fileno(), level, option, buffer, ctypes.byref(length)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw


def parse_entries(entries: bytes, underflow: int, layout: _Layout) -> Chain:
    """Return the chain whose policy stands at `underflow`; raises `struct.error` for what is cut short."""
    rules = []
    offset = 0
    while offset < len(entries):
        target, following = OFFSETS.unpack_from(entries, offset + layout.match + 4)
        if following < layout.match:
            raise struct.error("an entry without length")
        (verdict,) = VERDICT.unpack_from(entries, offset + target + 32)
        (name,) = TARGET_NAME.unpack_from(entries, offset + target)
        (protocol,) = PROTOCOL.unpack_from(entries, offset + layout.protocol)
        inverted = entries[offset + layout.inverted]
        plain = target == layout.head and not protocol and not inverted
        if plain and offset != underflow:
            standard = not name.strip(b"\0")
            rules.append(_rule(entries, offset, layout, standard and verdict == ACCEPT))
        offset += following
    target, _ = OFFSETS.unpack_from(entries, underflow + layout.match + 4)
    (policy,) = VERDICT.unpack_from(entries, underflow + target + 32)
    return Chain(policy, rules)


def _rule(entries: bytes, offset: int, layout: _Layout, accept: bool) -> Rule:
    size = layout.address
    fields = [entries[offset + place * size : offset + (place + 1) * size] for place in range(4)]
    source, destination, source_mask, destination_mask = fields
    names = offset + 4 * size
    input_name, output_name = entries[names : names + 16], entries[names + 16 : names + 32]
    return Rule(
        input_name.partition(b"\0")[0].decode(errors="replace"),
        output_name.partition(b"\0")[0].decode(errors="replace"),
        _network(source, source_mask),
        _network(destination, destination_mask),
        accept,
    )


def _network(address: bytes, mask: bytes) -> Network | None:
    length = int.from_bytes(mask, "big").bit_count()
    if not length:
        return None
    try:
        return ipaddress.ip_network((address, length), strict=False)
    except ValueError:
        return None
