"""The device through which the host hands its packets to us and takes those of others: a veth pair where the
kernel has all that it needs (`vethpair`), else a TUN (`tun`).
"""

from __future__ import annotations

import contextlib
import logging
import os

from crossedge.host.links import check_name, delete_link, get_link
from crossedge.host.netlink import Batch, Netlink
from crossedge.host.packet import overflowed
from crossedge.host.tun import BIG_TCP, MTU, OFFLOADS, DeviceTakenError, Tun, open_tun, tun_name
from crossedge.host.vethpair import open_pair, pair_name, remove_pair

__all__ = ["attached_name", "open_device", "overflowed", "remove_device"]

log = logging.getLogger(__name__)


def open_device(
    name: str,
    descriptor: int | None = None,
    *,
    disable: frozenset[str] = frozenset(),
    mtu: int = MTU,
) -> Tun:
    """Open the device `name` in this thread's namespace, making it where it does not exist.

    It is a veth pair, unless `disable` names an offload (of `OFFLOADS`, or `BIG_TCP`), or the kernel has not
    what a pair needs: then a TUN, and the log says why. A device of ours is adopted with its addresses and
    routes; one of the other kind is replaced. With `descriptor`, which is then ours, an inherited open device
    is taken over if it fits, else that is closed. The link is neither brought up nor given addresses.

    Raises `OSError`: `DeviceTakenError` where another process holds the device, or the link is not ours.
    """
    check_name(name)
    if unknown := disable - OFFLOADS.keys() - {BIG_TCP}:
        raise ValueError(f"unknown offloads: {', '.join(sorted(unknown))}")
    with contextlib.ExitStack() as unused:
        if descriptor is not None:
            unused.callback(os.close, descriptor)
        if not disable:
            try:
                opened = open_pair(name, descriptor, mtu=mtu)
            except DeviceTakenError:
                raise
            except OSError as error:
                log.warning(
                    "%s is a TUN, and not a veth pair, which takes larger packets: %s",
                    name,
                    error.strerror or error,
                )
            else:
                if opened.descriptor == descriptor:
                    unused.pop_all()
                return opened
        remove_pair(name)
        if descriptor is not None and tun_name(descriptor) == name:
            unused.pop_all()
            inherited: int | None = descriptor
        else:
            inherited = None
        return open_tun(name, descriptor=inherited, disable=disable - {BIG_TCP}, mtu=mtu)


def attached_name(descriptor: int) -> str | None:
    """Return the name of the device that its descriptor (to read from) belongs to.

    None if the device was deleted under it.
    """
    return tun_name(descriptor) or pair_name(descriptor)


def remove_device(name: str) -> bool:
    """Delete the device `name` in this thread's namespace, held or not; tell whether there was one of ours.

    Raises `NetlinkError`.
    """
    if remove_pair(name, held=True):
        return True
    with Netlink() as netlink:
        link = get_link(netlink, name)
        if link is None or link.kind != "tun":
            return False
        batch = Batch()
        delete_link(batch, link.index)
        netlink.run(batch)
    return True
