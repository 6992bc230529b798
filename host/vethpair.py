"""A veth pair in a TUN's place: it takes and gives IPv4 super-packets beyond the 64 KiB where a TUN ends.

    host, pods --> crossedge0 (near end)  ====  crossedge0-far (far end) --> reader
               <--                                                       <-- writer

Both ends are in one namespace. Addresses and routes are the near end's, as they would be the TUN's; the far
end has none, and two packet sockets that do what the TUN's descriptor does. Neither end asks for neighbours:
all frames go to the near end's own address, and the far end's host stack takes none of those.

Pairs of ours are known by the addresses of their ends, which are fixed: they never leave the host.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import replace
from typing import NamedTuple

from crossedge.host import sysctl
from crossedge.host.ethtool import features, set_features
from crossedge.host.links import (
    Link,
    VethEnd,
    add_veth,
    delete_link,
    get_link,
    rouse_veth,
    set_link,
)
from crossedge.host.netlink import Batch, Netlink
from crossedge.host.packet import hold, namespace_of, open_reader, open_writer, reads, take_reader
from crossedge.host.tun import (
    BIG_TCP,
    GSO_MAX_SIZE,
    OFFLOADS,
    VNET_HEADER,
    DeviceTakenError,
    Tun,
    claim_tun,
    tun_name,
)

NEAR_MAC = bytes.fromhex("02ce5e000001")
FAR_MAC = bytes.fromhex("02ce5e000002")
FAR_SUFFIX = "-far"
NEW_SUFFIX = "-new"
STEM = 11
"""Bytes of the near end's name that the others begin with: so they are no longer than a name may be."""
BIG_TCP_SIZE = 375_000
"""Longest IPv4 super-packet that leaves by the near end, in bytes: six records of 47 segments, and what TCP
keeps free for headers."""
INWARD_SIZE = 524_280
"""Longest super-packet towards the host, and on to its pods, in bytes: the kernel's own bound, and more than
is ever joined."""
FAR_MTU = 65_535
KEPT = frozenset(
    {
        "tx-checksum-ip-generic",
        "tx-scatter-gather",
        "tx-scatter-gather-fraglist",
        "tx-tcp-segmentation",
        "tx-tcp6-segmentation",
        "tx-udp-segmentation",
    }
)
"""What the near end leaves to us. The kernel does the rest before: a virtio header has no words for it, and
without them the socket would drop a packet."""


class Pair(NamedTuple):
    """Both ends, in one namespace."""

    near: Link
    far: Link


def far_name(name: str) -> str:
    """Return the name of the other end of the device `name`."""
    return _stem(name) + FAR_SUFFIX


def _stem(name: str) -> str:
    return name.encode()[:STEM].decode(errors="ignore")


def is_ours(netlink: Netlink, link: Link) -> bool:
    """Tell whether a link is the near end of a pair of ours, whole or not: by its address, or the other's."""
    if is_near_end(link):
        return True
    other = get_link(netlink, link.peer) if link.kind == "veth" and link.namespace < 0 else None
    return other is not None and is_far_end(other)


def is_near_end(link: Link) -> bool:
    """Tell by its address whether a link is a near end of our making."""
    return link.kind == "veth" and link.mac == NEAR_MAC.hex(":")


def is_far_end(link: Link) -> bool:
    """Tell by its address whether a link is a far end of our making."""
    return link.kind == "veth" and link.mac == FAR_MAC.hex(":")


def find_pair(netlink: Netlink, link: int | str) -> Pair | None:
    """Return the pair whose near end is a link, by index or name; None where it is not ours, or not whole."""
    near = get_link(netlink, link)
    if near is None or near.namespace >= 0 or not is_ours(netlink, near):
        return None
    far = get_link(netlink, near.peer)
    return Pair(near, far) if far is not None else None


def pair_name(descriptor: int) -> str | None:
    """Return the name of the near end of the pair that a reading socket belongs to, wherever the caller is.

    None if it was deleted under it or is another descriptor, or where the ends are not in one namespace.
    """
    far = reads(descriptor)
    if far is None:
        return None
    try:
        namespace = namespace_of(descriptor)
        try:
            with namespace, Netlink() as netlink:
                link = get_link(netlink, far)
                near = get_link(netlink, link.peer) if link is not None and link.namespace < 0 else None
        finally:
            namespace.close()
    except OSError:
        return None
    return near.name if near is not None and is_ours_as(near, link) else None


def is_ours_as(near: Link, far: Link | None) -> bool:
    """Tell whether two links are the ends of one pair."""
    return far is not None and (near.kind, near.peer, far.peer) == ("veth", far.index, near.index)


def open_pair(name: str, descriptor: int | None, *, mtu: int) -> Tun:
    """Open the veth pair `name` in this thread's namespace, making it where it does not exist.

    A pair of ours is adopted with its addresses and routes; a TUN of ours gives way to it once it stands.
    `descriptor` is used if it is a reading socket of that pair. The far end is brought up, the near end not.

    Raises `DeviceTakenError` where another process holds the device, or a link of that name is not ours;
    another `OSError` where the kernel or our rights do not suffice: then what was there is still there.
    """
    with Netlink() as netlink, contextlib.ExitStack() as undo, contextlib.ExitStack() as done:
        link = get_link(netlink, name)
        replaces = link is not None and link.kind == "tun"
        if link is not None and not replaces and not is_ours(netlink, link):
            raise DeviceTakenError(errno.EINVAL, f"cannot open {name}: a link of that name is not ours")
        if replaces and (descriptor is None or tun_name(descriptor) != name):
            done.callback(os.close, claim_tun(name))
        pair = find_pair(netlink, name)
        if pair is None:
            pair = _make(netlink, name, mtu, _stem(name) + NEW_SUFFIX if replaces else name)
            undo.callback(_delete, pair.near.index)
        holder = _hold(netlink, pair.far, name)
        undo.callback(os.close, holder)
        pair = _complete(netlink, pair, name, mtu)
        far = pair.far.name
        if descriptor is not None and reads(descriptor) == far:
            take_reader(descriptor)
            reader = descriptor
        else:
            reader = open_reader(far)
            undo.callback(os.close, reader)
        writer = open_writer(far)
        undo.callback(os.close, writer)
        if replaces:
            batch = Batch()
            delete_link(batch, name)
            set_link(batch, pair.near.index, rename=name)
            netlink.run(batch)
        if pair_name(reader) != name:
            raise OSError(errno.EOPNOTSUPP, "this kernel does not tell what a packet socket reads from")
        undo.pop_all()
    return Tun(reader, name, frozenset({*OFFLOADS, BIG_TCP}), VNET_HEADER, writer, NEAR_MAC, holder)


def reopen_pair(tun: Tun, netlink: Netlink) -> Tun:
    """Return an open pair with sockets made anew, and what holds it; the earlier sockets stay the caller's.

    In this thread's namespace. A socket whose link was down has an error to tell, and goes on once that is
    read; but some event loops (libuv's) watch it no more, without reading it. Raises `OSError`.
    """
    pair = find_pair(netlink, tun.name)
    if pair is None:
        raise OSError(errno.ENODEV, f"the veth pair {tun.name} is gone again")
    reader = open_reader(pair.far.name)
    try:
        writer = open_writer(pair.far.name)
    except BaseException:
        os.close(reader)
        raise
    return replace(tun, descriptor=reader, sender=writer)


def remove_pair(name: str, *, held: bool = False) -> bool:
    """Delete what there is of the pair `name` in this thread's namespace; tell whether there was something.

    Raises `NetlinkError`, and `DeviceTakenError` where a process holds it, unless it may be `held`.
    """
    with Netlink() as netlink:
        return _sweep(netlink, name, held=held)


def _sweep(netlink: Netlink, name: str, *, held: bool = False) -> bool:
    """Delete the near end of that name and the far end of its name; with one goes the other."""
    found = False
    far = get_link(netlink, far_name(name))
    if far is not None and is_far_end(far):
        if not held:
            _let_go(netlink, far, name)
        _delete_by(netlink, far.index)
        found = True
    near = get_link(netlink, name)
    if near is not None and is_ours(netlink, near):
        if not held and (pair := find_pair(netlink, name)) is not None:
            _let_go(netlink, pair.far, name)
        _delete_by(netlink, near.index)
        found = True
    return found


def _let_go(netlink: Netlink, far: Link, name: str) -> None:
    """Make sure that nobody holds a pair; raises `DeviceTakenError`. Where we cannot ask, nobody does."""
    try:
        os.close(_hold(netlink, far, name))
    except DeviceTakenError:
        raise
    except OSError:
        return


def _hold(netlink: Netlink, far: Link, name: str) -> int:
    if not far.up:  # a group takes only sockets that receive
        batch = Batch()
        set_link(batch, far.index, up=True, link_local=False)
        netlink.run(batch)
    return hold(far.name, far.index, name)


def _delete(index: int) -> None:
    with Netlink() as netlink, contextlib.suppress(OSError):
        _delete_by(netlink, index)


def _delete_by(netlink: Netlink, index: int) -> None:
    batch = Batch()
    delete_link(batch, index)
    netlink.run(batch)


def _make(netlink: Netlink, name: str, mtu: int, made: str) -> Pair:
    """Make the pair, its near end named `made` for now. What is left of an earlier one goes."""
    _sweep(netlink, name)
    far = far_name(name)
    batch = Batch()
    # Device managers leave addresses alone that are given.
    add_veth(batch, VethEnd(made, mac=NEAR_MAC, mtu=mtu), VethEnd(far, mac=FAR_MAC, mtu=FAR_MTU))
    set_link(batch, far, link_local=False)
    netlink.run(batch)
    without_ipv6(far)
    pair = find_pair(netlink, made)
    if pair is None:
        raise OSError(errno.ENODEV, f"the veth pair {name} is gone again")
    return pair


def without_ipv6(far: str) -> None:
    """Have the far end neither solicit routers nor report groups."""
    path = f"net/ipv6/conf/{far}/disable_ipv6"
    with contextlib.suppress(OSError):  # it has no address all the same, and what it gets is dropped
        if sysctl.read(path) == "0":
            sysctl.write(path, "1")


def _complete(netlink: Netlink, pair: Pair, name: str, mtu: int) -> Pair:
    """Set all that a pair must have, and return it as it is then; raises `OSError` where it has not."""
    batch = Batch()
    shape(batch, pair, pair.near.name, far_name(name), mtu)
    netlink.run(batch)
    leave_offloads(pair.near.name)
    found = find_pair(netlink, pair.near.index)
    if found is None:
        raise OSError(errno.ENODEV, f"the veth pair {name} is gone again")
    if not near_fits(found.near, pair.near.name, mtu) or not far_fits(found.far, far_name(name)):
        raise OSError(
            errno.EOPNOTSUPP, "this kernel has no super-packets of IPv4 beyond 64 KiB on veth pairs"
        )
    return found


def near_fits(link: Link, name: str, mtu: int) -> bool:
    """Tell whether the near end is as it should be, up or not."""
    shown = (link.name, link.mac, link.arp, link.mtu, link.gso_max_size, link.gso_ipv4_max_size)
    return shown == (name, NEAR_MAC.hex(":"), False, mtu, GSO_MAX_SIZE, BIG_TCP_SIZE)


def far_fits(link: Link, name: str) -> bool:
    """Tell whether the far end is as it should be, and up."""
    shown = (link.name, link.mac, link.arp, link.mtu, link.gso_max_size, link.gso_ipv4_max_size, link.up)
    return shown == (name, FAR_MAC.hex(":"), False, FAR_MTU, INWARD_SIZE, INWARD_SIZE, True)


def shape(batch: Batch, pair: Pair, name: str, far: str, mtu: int) -> None:
    """Give both ends their names, addresses and sizes, where they have others, and bring up the far end.

    The kernel renames links that are up, and lets them keep their addresses and routes (since 6.2).
    """
    if not near_fits(pair.near, name, mtu):
        set_link(
            batch,
            pair.near.index,
            arp=False,
            mtu=mtu,
            gso_max_size=GSO_MAX_SIZE,
            gso_ipv4_max_size=BIG_TCP_SIZE,
            mac=NEAR_MAC if pair.near.mac != NEAR_MAC.hex(":") else b"",
            rename=name if pair.near.name != name else "",
        )
    if not far_fits(pair.far, far):
        set_link(
            batch,
            pair.far.index,
            up=True,
            arp=False,
            mtu=FAR_MTU,
            gso_max_size=INWARD_SIZE,
            gso_ipv4_max_size=INWARD_SIZE,
            mac=FAR_MAC if pair.far.mac != FAR_MAC.hex(":") else b"",
            rename=far if pair.far.name != far else "",
            link_local=False,
        )
        if not pair.far.up:
            rouse_veth(batch, pair.near.index)


def leave_offloads(name: str) -> bool:
    """Have the near end leave `KEPT` to us and nothing else of what is done to packets that leave.

    Returns whether that was otherwise; raises `OSError`, also where the kernel does not have it so.
    """
    wrong = _wrong(name)
    if wrong:
        set_features(name, wrong)
        if left := _wrong(name):
            raise OSError(errno.EOPNOTSUPP, f"the kernel has {', '.join(sorted(left))} otherwise on {name}")
    return bool(wrong)


def leaves_offloads(name: str) -> bool:
    """Tell whether the near end does as `leave_offloads` has it; False also where it cannot be asked."""
    try:
        return not _wrong(name)
    except OSError:
        return False


def _wrong(name: str) -> dict[str, bool]:
    shown = {each: on for each, on in features(name).items() if each.startswith("tx-")}
    return {each: each in KEPT for each, on in shown.items() if on != (each in KEPT)}
