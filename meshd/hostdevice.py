"""Our device in the kernel of one namespace, TUN or veth pair: opened, known by its links, and set right."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

from crossedge.host.device import attached_name, open_device
from crossedge.host.links import Link, delete_link, get_link, rouse_veth, set_link
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Batch, Netlink
from crossedge.host.tun import GSO_MAX_SIZE, Tun
from crossedge.host.vethpair import (
    far_fits,
    far_name,
    find_pair,
    is_far_end,
    is_near_end,
    leave_offloads,
    leaves_offloads,
    near_fits,
    reopen_pair,
    shape,
    without_ipv6,
)

log = logging.getLogger(__name__)


class Mended(NamedTuple):
    """What a comparison with the kernel found."""

    changed: bool
    """Something was otherwise than it should be."""
    lost: bool
    """Addresses or routes may have gone with it."""


class HostDevice:
    """The device as it should be: under its name, up, with its MTU and sizes."""

    def __init__(
        self,
        namespace: Namespace,
        disable: frozenset[str] = frozenset(),
        on_tun: Callable[[Tun], None] | None = None,
    ) -> None:
        """Nothing is done before `open`; `disable` and `on_tun` are as `HostState` says."""
        self._namespace = namespace
        self._disable = disable
        self._on_tun = on_tun
        self.tun: Tun | None = None
        self.index = 0
        """Of the link that has addresses and routes."""
        self._far = 0
        """Index of a pair's other end,"""
        self._losses = 0
        """and how often that had lost its carrier when its sockets were opened."""

    def open(self, netlink: Netlink, name: str, mtu: int, descriptor: int | None = None) -> Tun:
        """Open the device, or adopt the open one that is inherited; raises `OSError`.

        To be called in the thread's namespace. A descriptor whose device was deleted meanwhile, or has
        another name, is closed and not used.
        """
        if descriptor is not None and attached_name(descriptor) != name:
            log.warning("the inherited device is not %s, and is not used", name)
            os.close(descriptor)
            descriptor = None
        self.tun = open_device(name, descriptor, disable=self._disable, mtu=mtu)
        self._find(netlink, name)
        return self.tun

    def _find(self, netlink: Netlink, name: str) -> None:
        link = get_link(netlink, name)
        if link is None:
            raise OSError(f"the device {name} is gone again")
        self.index, self._far = link.index, link.peer if link.kind == "veth" else 0
        far = get_link(netlink, self._far) if self._far else None
        self._losses = far.carrier_losses if far is not None else 0

    def close(self) -> None:
        """Close its descriptors; all stays in place."""
        if self.tun is not None:
            self.tun.close()
            self.tun = None

    def concerned(self, link: Link, name: str, mtu: int, *, deleted: bool) -> bool:
        """Tell whether an event of a link is somebody else's doing to our device."""
        if self._far and (link.index == self._far or link.name == far_name(name)):
            whole = (link.index, link.peer, link.namespace) == (self._far, self.index, -1)
            return deleted or not whole or not far_fits(link, far_name(name))
        if link.index != self.index and link.name != name:
            return False
        if deleted or not link.up or (link.index, link.name) != (self.index, name):
            return True
        if not self._far:
            return (link.mtu, link.gso_max_size) != (mtu, GSO_MAX_SIZE)
        if link.peer != self._far or link.namespace >= 0 or not near_fits(link, name, mtu):
            return True
        with self._namespace:
            return not leaves_offloads(name)

    def synchronise(self, netlink: Netlink, name: str, mtu: int) -> Mended:
        """Have the device, under its name, up and as it should be; raises `OSError`."""
        if self.tun is None:
            raise RuntimeError("the device is not open")
        gone = not self._is_there(netlink, self.tun)
        if gone:
            self._remove_rest(netlink)
            self._make_again(netlink, self.tun, name, mtu)
        mended = (self._set_pair if self._far else self._set_tun)(netlink, name, mtu)
        return Mended(gone or mended.changed, gone or mended.lost)

    def _is_there(self, netlink: Netlink, tun: Tun) -> bool:
        """Tell whether the open device is in our namespace, under whatever name.

        A pair that lost an end is not, even if that came back: the sockets have let go of it.
        """
        link = get_link(netlink, self.index)
        if link is None or attached_name(tun.descriptor) != link.name:
            return False
        return link.kind == tun.kind and (not self._far or link.peer == self._far)

    def _remove_rest(self, netlink: Netlink) -> None:
        """Delete what is left of a pair that is not whole: we hold it ourselves, so nobody else may."""
        for index, ours in ((self._far, is_far_end), (self.index, is_near_end)):
            link = get_link(netlink, index) if self._far else None
            if link is not None and ours(link):
                batch = Batch()
                delete_link(batch, index)
                netlink.run(batch)

    def _make_again(self, netlink: Netlink, before: Tun, name: str, mtu: int) -> None:
        with self._namespace:
            self.tun = open_device(name, disable=self._disable, mtu=mtu)
        log.warning("the device %s was deleted and is made again", name)
        self._hand_over(before, self.tun)
        self._find(netlink, name)

    def _hand_over(self, before: Tun, tun: Tun) -> None:
        if self._on_tun is not None:
            self._on_tun(tun)
        before.close(tun)

    def _set_tun(self, netlink: Netlink, name: str, mtu: int) -> Mended:
        link = get_link(netlink, self.index)
        if link is None:
            raise OSError(f"the device {name} is gone again")
        fits = (link.name, link.mtu, link.gso_max_size) == (name, mtu, GSO_MAX_SIZE)
        up = link.up
        batch = Batch()
        if link.name != name:
            up = False  # before Linux 6.2 no link is renamed that is up
            set_link(batch, self.index, up=False)
            set_link(batch, self.index, rename=name)
        if not up or not fits:
            set_link(batch, self.index, up=True, mtu=mtu, gso_max_size=GSO_MAX_SIZE, link_local=up)
            netlink.run(batch)
        return Mended(changed=not up or not fits, lost=not up)

    def _set_pair(self, netlink: Netlink, name: str, mtu: int) -> Mended:
        pair = find_pair(netlink, self.index)
        if pair is None:
            raise OSError(f"the device {name} is gone again")
        near, far = pair
        batch = Batch()
        shape(batch, pair, name, far_name(name), mtu)
        if not near.up:
            set_link(batch, near.index, up=True, link_local=False)
            rouse_veth(batch, far.index)
        netlink.run(batch)
        with self._namespace:
            mended = leave_offloads(name)
            without_ipv6(far_name(name))
            if self.tun is not None and far.carrier_losses != self._losses:
                before, self.tun = self.tun, reopen_pair(self.tun, netlink)
                self._losses = far.carrier_losses
                self._hand_over(before, self.tun)
                mended = True
        return Mended(changed=len(batch) > 0 or mended, lost=not near.up)
