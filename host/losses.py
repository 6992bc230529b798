"""In which other network namespaces something was taken away, told by one socket for all of them.

The kernel reports to a socket with NETLINK_LISTEN_ALL_NSID what happens in every namespace that has an id
here, as the namespaces of our veth pairs' far ends do. A filter in the kernel lets through what takes away:
addresses, routes and neighbours that are deleted, links that are switched off. So hundreds of namespaces
cost nothing while they are left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
from typing import Final

from crossedge.host.addresses import RTM_DELADDR
from crossedge.host.links import IFF_UP, MADE, RTM_NEWLINK
from crossedge.host.monitor import ROUTE_GROUPS, SO_RCVBUFFORCE
from crossedge.host.neighbours import RTM_DELNEIGH
from crossedge.host.netlink import (
    I32,
    NETLINK_ADD_MEMBERSHIP,
    NETLINK_ROUTE,
    SOL_NETLINK,
    U16,
    U32,
)
from crossedge.host.routes import RTM_DELROUTE

NETLINK_LISTEN_ALL_NSID: Final = 8
SO_ATTACH_FILTER: Final = 26
BUFFER: Final = 4 * 1024 * 1024
MOST: Final = 8192
"""Most messages that one call of `drain` reads."""

TYPE, FLAGS, CHANGED = 4, 24, 28
"""Where a message has its type, and one about a link its flags and which of them changed (`ifi_change`)."""
LOAD_WORD, LOAD_HALF, IF_EQUAL, IF_ANY, RETURN = 0x20, 0x28, 0x15, 0x45, 0x06
"""Instructions of classic BPF."""


def _word(value: int) -> int:
    """Return a number as BPF loads it, which takes memory for network order."""
    return int.from_bytes(U32.pack(value), "big")


def _half(value: int) -> int:
    return int.from_bytes(U16.pack(value), "big")


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


FILTER: Final = (
    (LOAD_HALF, 0, 0, TYPE),
    (IF_EQUAL, 8, 0, _half(RTM_DELADDR)),
    (IF_EQUAL, 7, 0, _half(RTM_DELROUTE)),
    (IF_EQUAL, 6, 0, _half(RTM_DELNEIGH)),
    (IF_EQUAL, 0, 6, _half(RTM_NEWLINK)),
    (LOAD_WORD, 0, 0, FLAGS),
    (IF_ANY, 4, 0, _word(IFF_UP)),
    (LOAD_WORD, 0, 0, CHANGED),
    (IF_EQUAL, 2, 0, MADE),
    (IF_ANY, 0, 1, _word(IFF_UP)),
    (RETURN, 0, 0, 0xFFFFFFFF),
    (RETURN, 0, 0, 0),
)
"""Jumps count from the instruction behind; the last two keep and drop."""


class Losses:
    """Tells in which other namespaces something was taken away since it was last asked."""

    def __init__(self) -> None:
        """Listen from now on, in the calling thread's namespace; `OSError` without CAP_NET_BROADCAST."""
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_ROUTE
        )
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
            instructions = (_Instruction * len(FILTER))(*(_Instruction(*each) for each in FILTER))
            program = _Program(len(FILTER), instructions)
            self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(program))
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
            self._socket.bind((0, 0))
            for kind in ("link", "address", "route", "neighbour"):
                for group in ROUTE_GROUPS[kind]:
                    self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor, which is readable once there is something to be told."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop; may be called twice."""
        self._socket.close()

    def drain(self) -> tuple[set[int], bool]:
        """Return the ids of the namespaces (as `Link.namespace` has them), and whether some may be missing.

        What happened in our own namespace is left out.
        """
        found: set[int] = set()
        missed = False
        space = socket.CMSG_SPACE(I32.size)
        for _ in range(MOST):
            try:
                _, ancillary, _, _ = self._socket.recvmsg(1, space)  # its content is not looked at
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                missed = True
                continue
            for level, kind, data in ancillary:
                if (level, kind) == (SOL_NETLINK, NETLINK_LISTEN_ALL_NSID) and len(data) >= I32.size:
                    found.add(I32.unpack_from(data)[0])
        return found, missed
