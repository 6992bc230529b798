"""In which other network namespaces something was taken away, told by one socket for all of them.

The kernel reports to a socket with NETLINK_LISTEN_ALL_NSID what happens in every namespace that has an id
here, as the namespaces of our veth pairs' far ends do. A filter in the kernel lets through what takes away:
addresses, routes and neighbours that are deleted, links that are switched off. So hundreds of namespaces
cost nothing while they are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Final

from crossedge.host.bpf import attach, losses
from crossedge.host.monitor import BUFFER, ROUTE_GROUPS, SO_RCVBUFFORCE
from crossedge.host.netlink import I32, NETLINK_ADD_MEMBERSHIP, NETLINK_ROUTE, SOL_NETLINK

NETLINK_LISTEN_ALL_NSID: Final = 8
MOST: Final = 8192
"""Most messages that one call of `drain` reads."""


class Losses:
    """Tells in which other namespaces something was taken away since it was last asked."""

    def __init__(self) -> None:
        """Listen from now on, in the calling thread's namespace; `OSError` without CAP_NET_BROADCAST."""
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_ROUTE
        )
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
            attach(self._socket, losses())
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
