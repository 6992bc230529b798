"""Opens the daemon's UDP sockets, or takes over what the service manager kept of an earlier life."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Mapping
from typing import Final

from crossedge.host import descriptors
from crossedge.host.device import attached_name
from crossedge.host.tun import Tun
from crossedge.host.udp import UdpSocket, open_udp
from crossedge.meshd.config import MeshdConfig
from crossedge.meshd.desired import MARK
from crossedge.meshd.resolve import FAMILIES
from crossedge.wire.errors import ConfigError

TUN: Final = "tun"
UDP: Final = {4: "udp4", 6: "udp6"}

log = logging.getLogger("meshd")


class Inherited:
    """The descriptors that were kept for us. What does not fit is closed, and no longer kept."""

    def __init__(self, given: Mapping[str, list[int]]) -> None:
        """`given` is what `descriptors.inherited` returned; all of it is ours from now on."""
        self._given = {name: list(numbers) for name, numbers in given.items()}
        self._taken: dict[str, os.stat_result] = {}

    def tun(self, name: str) -> int | None:
        """Return a descriptor of the device `name`, then the caller's; None where there is none."""
        return self._take(TUN, [attached_name(number) == name for number in self._given.get(TUN, [])])

    def udp(self, version: int, port: int) -> int | None:
        """Return a UDP socket of an IP version bound to `port` (0: any), likewise."""
        name = UDP[version]
        return self._take(name, [_fits(number, version, port) for number in self._given.get(name, [])])

    def _take(self, name: str, fit: list[bool]) -> int | None:
        if True not in fit:
            return None
        number = self._given[name].pop(fit.index(True))
        self._taken[name] = os.fstat(number)
        return number

    def finish(self, sockets: Mapping[int, UdpSocket], tun: Tun) -> None:
        """Close what was not taken, and have the service manager keep what is in use now, and only that."""
        for name, numbers in self._given.items():
            for number in numbers:
                os.close(number)
            if numbers:
                log.warning("an inherited %s is of no use now, and closed", name)
        in_use = {UDP[version]: opened.socket.fileno() for version, opened in sockets.items()}
        in_use[TUN] = tun.descriptor
        for name in self._given.keys() | in_use.keys():
            if name in self._taken and not self._given[name] and self._uses(name, in_use):
                continue  # it is kept already
            descriptors.unstore(name)
            if name in in_use:
                descriptors.store(name, in_use[name])
        if self._taken:
            log.info("taken over from an earlier life: %s", ", ".join(sorted(self._taken)))
        self._given.clear()

    def _uses(self, name: str, in_use: Mapping[str, int]) -> bool:
        """Tell whether what was taken is in use: there may be a packet socket instead of a TUN now."""
        return name in in_use and os.path.samestat(self._taken[name], os.fstat(in_use[name]))


def _fits(descriptor: int, version: int, port: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            is_udp = copy.type == socket.SOCK_DGRAM and copy.family == FAMILIES[version]
            return is_udp and copy.getsockname()[1] in ({port} if port else range(1, 65536))
    except OSError:
        return False


def open_sockets(config: MeshdConfig, inherited: Inherited) -> dict[int, UdpSocket]:
    """Return a socket for each IP version, all on one port; inherited ones are taken over.

    Raises:
        ConfigError: the port is in use, or neither IP version can be had.
    """
    listen = config.listen
    off = frozenset(config.disable_offloads) & {"gso", "gro", "stamps"}
    sockets: dict[int, UdpSocket] = {}
    port = listen.port
    with contextlib.ExitStack() as undo:
        for version, wanted in ((4, listen.ipv4), (6, listen.ipv6)):
            if not wanted:
                continue
            descriptor = inherited.udp(version, port)
            try:
                opened = open_udp(FAMILIES[version], port, MARK, disable=off, descriptor=descriptor)
            except OSError as error:
                if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    log.warning("no IPv%d in this kernel", version)
                    continue
                what = f"a UDP port that can be used: {port} cannot (IPv{version}: {error.strerror or error})"
                if error.errno == errno.EPERM:
                    raise ConfigError("meshd", "", "to run as root: it needs CAP_NET_ADMIN") from error
                if error.errno == errno.EADDRINUSE:
                    what = f"a UDP port that is free: {port} is in use (IPv{version})"
                raise ConfigError("meshd.toml", "listen.port", what) from error
            undo.callback(opened.close)
            sockets[version] = opened
            port = opened.port
        undo.pop_all()
    if not sockets:
        raise ConfigError("meshd.toml", "listen", "IPv4 or IPv6 to be on, and in the kernel")
    return sockets
