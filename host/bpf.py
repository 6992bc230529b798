"""Classic BPF on netlink sockets: of all that the kernel reports, be woken only for what one must see."""

from __future__ import annotations

import ctypes
import socket
from typing import Final

from crossedge.host.addresses import RTM_DELADDR
from crossedge.host.links import IFF_UP, MADE, RTM_DELLINK, RTM_NEWLINK
from crossedge.host.neighbours import RTM_DELNEIGH
from crossedge.host.netlink import U16, U32
from crossedge.host.routes import RTM_DELROUTE

SO_ATTACH_FILTER: Final = 26
TYPE, PROTOCOL, FLAGS, CHANGED = 4, 21, 24, 28
"""Where a message has its type, one about a route its protocol, about a link its flags and `ifi_change`."""
LOAD_WORD, LOAD_HALF, LOAD_BYTE, IF_EQUAL, IF_ANY, RETURN = 0x20, 0x28, 0x30, 0x15, 0x45, 0x06

Program = tuple[tuple[int, int, int, int], ...]
"""Instructions: code, how far to jump where a condition holds, where not, and the operand."""


class _Instruction(ctypes.Structure):
    """struct sock_filter (linux/filter.h)."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def attach(sock: socket.socket, program: Program) -> None:
    """Have the kernel drop what a program does not keep; raises `OSError`."""
    instructions = (_Instruction * len(program))(*(_Instruction(*each) for each in program))
    packed = bytes(_Program(len(program), instructions))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, packed)


def _loaded(packed: bytes) -> int:
    """Return a number as BPF loads it, which takes memory for network order."""
    return int.from_bytes(packed, "big")


def losses(*, links: bool = False, protocol: int | None = None) -> Program:
    """Return what keeps messages of addresses, routes and neighbours deleted, and of links switched off.

    Args:
        links: keep messages of links deleted as well.
        protocol: of all routes keep only those of this rtproto.
    """
    rows: list[tuple[str, int, str, str, int]] = [
        ("", LOAD_HALF, "", "", TYPE),
        ("", IF_EQUAL, "keep", "", _loaded(U16.pack(RTM_DELADDR))),
        ("", IF_EQUAL, "keep", "", _loaded(U16.pack(RTM_DELNEIGH))),
        ("", IF_EQUAL, "keep" if links else "drop", "", _loaded(U16.pack(RTM_DELLINK))),
        ("", IF_EQUAL, "keep" if protocol is None else "route", "", _loaded(U16.pack(RTM_DELROUTE))),
        ("", IF_EQUAL, "", "drop", _loaded(U16.pack(RTM_NEWLINK))),
        ("", LOAD_WORD, "", "", FLAGS),
        ("", IF_ANY, "drop", "", _loaded(U32.pack(IFF_UP))),
        ("", LOAD_WORD, "", "", CHANGED),
        ("", IF_EQUAL, "drop", "", MADE),
        ("", IF_ANY, "keep", "drop", _loaded(U32.pack(IFF_UP))),
        ("route", LOAD_BYTE, "", "", PROTOCOL),
        ("", IF_EQUAL, "keep", "drop", protocol or 0),
        ("keep", RETURN, "", "", 0xFFFFFFFF),
        ("drop", RETURN, "", "", 0),
    ]
    place = {label: number for number, (label, *_) in enumerate(rows) if label}

    def jump(number: int, label: str) -> int:
        return place[label] - number - 1 if label else 0

    return tuple((code, jump(n, yes), jump(n, no), value) for n, (_, code, yes, no, value) in enumerate(rows))
