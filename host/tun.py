"""TUN devices with a virtio header in front of each packet, so that one read returns up to 64 KiB."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass, field

from crossedge.host.links import check_name, set_link
from crossedge.host.netlink import Batch, Netlink

TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFREQ = struct.Struct("16sH22x")

OFFLOADS = {"csum": 0x01, "tso4": 0x02, "tso6": 0x04, "uso4": 0x20, "uso6": 0x40}
"""What the kernel may leave to us, by name, and its bit (TUN_F_*). The others need "csum"."""

VNET_HEADER = 10
"""Bytes of virtio header in front of each packet."""
HELD = "another process holds it"
MTU = 1380
GSO_MAX_SIZE = 62750
"""Largest super-packet, in bytes: one fits a train of 64 datagrams and 65,400 bytes on the underlay."""


BIG_TCP = "big_tcp"
"""The offload that only a veth pair has: IPv4 super-packets beyond 64 KiB."""


class DeviceTakenError(OSError):
    """The device is somebody else's: of another process (`EBUSY`), or a link that is not ours (`EINVAL`)."""


@dataclass(frozen=True, slots=True)
class Tun:
    """An open TUN device, or an open veth pair that stands in for one (see `vethpair`)."""

    descriptor: int
    """To read from. Non-blocking. Ours to close; a persistent device outlives it."""
    name: str
    offloads: frozenset[str]
    """Which of `OFFLOADS` the kernel took, kinds of super-packets that are read and may be written; of a veth
    pair all of them and `BIG_TCP`."""
    vnet_header: int = field(default=VNET_HEADER)
    sender: int = -1
    """To write to, where that is another descriptor than the one to read from: then it is a veth pair, and
    what is read and written is a virtio header, an Ethernet header of 14 bytes and a packet; -1 for a TUN."""
    mac: bytes = b""
    """Of a veth pair: the address, six bytes, to which what is written goes."""
    holder: int = -1
    """Of a veth pair: the descriptor that keeps other processes from opening it."""

    @property
    def kind(self) -> str:
        """What it is in the kernel: "veth" or "tun"."""
        return "veth" if self.sender >= 0 else "tun"

    def fileno(self) -> int:
        """Return the descriptor."""
        return self.descriptor

    def close(self, successor: Tun | None = None) -> None:
        """Close all descriptors, but for those that a successor has."""
        kept = (successor.descriptor, successor.sender, successor.holder) if successor is not None else ()
        for descriptor in (self.descriptor, self.sender, self.holder):
            if descriptor >= 0 and descriptor not in kept:
                os.close(descriptor)


def open_tun(
    name: str,
    persistent: bool = True,
    descriptor: int | None = None,
    *,
    disable: frozenset[str] = frozenset(),
    mtu: int = MTU,
    gso_max_size: int = GSO_MAX_SIZE,
) -> Tun:
    """Open the TUN `name` in this thread's namespace, making it where it does not exist, and set its sizes.

    An existing persistent device is adopted with its addresses and routes. With `descriptor`, which is then
    ours, an inherited open device is taken over. `disable` names offloads to do without, as if the kernel
    lacked them. The link is neither brought up nor given addresses.

    Raises `OSError`: `DeviceTakenError` where another process holds the device or `name` is no TUN.
    """
    check_name(name)
    if unknown := disable - OFFLOADS.keys():
        raise ValueError(f"unknown offloads: {', '.join(sorted(unknown))}")
    opened = _attach(name) if descriptor is None else _adopt(name, descriptor)
    try:
        fcntl.ioctl(opened, TUNSETVNETHDRSZ, struct.pack("=i", VNET_HEADER))
        fcntl.ioctl(opened, TUNSETPERSIST, int(persistent))
        offloads = _offload(opened, disable)
        batch = Batch()
        set_link(batch, name, mtu=mtu, gso_max_size=gso_max_size)
        with Netlink() as netlink:
            netlink.run(batch)
    except BaseException:
        os.close(opened)
        raise
    return Tun(opened, name, offloads)


def tun_name(descriptor: int) -> str | None:
    """Return the name of the TUN that a descriptor belongs to; None if that was deleted, or it is none."""
    try:
        found, _ = IFREQ.unpack(fcntl.ioctl(descriptor, TUNGETIFF, bytes(IFREQ.size)))
    except OSError:
        return None
    return str(found.rstrip(b"\0").decode(errors="replace"))


def _attach(name: str) -> int:
    opened = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(opened, TUNSETIFF, IFREQ.pack(name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    except OSError as error:
        os.close(opened)
        taken = {errno.EBUSY: HELD, errno.EINVAL: "a link of that name is no TUN of ours"}
        if error.errno in taken:
            raise DeviceTakenError(error.errno, f"cannot open TUN {name}: {taken[error.errno]}") from error
        raise OSError(error.errno, f"cannot open TUN {name}: {os.strerror(error.errno or 0)}") from error
    return opened


def claim_tun(name: str) -> int:
    """Return a descriptor that holds the TUN `name`, which exists; raises as `open_tun` does."""
    return _attach(name)


def _adopt(name: str, descriptor: int) -> int:
    try:
        found, flags = IFREQ.unpack(fcntl.ioctl(descriptor, TUNGETIFF, bytes(IFREQ.size)))
    except OSError as error:
        os.close(descriptor)
        raise OSError(
            error.errno, f"descriptor {descriptor} is no open TUN: {os.strerror(error.errno or 0)}"
        ) from error
    wanted = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    if found.rstrip(b"\0").decode() != name or flags & wanted != wanted:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"descriptor {descriptor} is not the TUN {name} with a virtio header")
    os.set_blocking(descriptor, False)
    os.set_inheritable(descriptor, False)
    return descriptor


def _offload(descriptor: int, disable: frozenset[str]) -> frozenset[str]:
    """Switch offloads on: all that are allowed, else without USO (Linux before 6.2), else none."""
    allowed = OFFLOADS.keys() - disable if "csum" not in disable else frozenset[str]()
    for names in (allowed, allowed - {"uso4", "uso6"}):
        try:
            fcntl.ioctl(descriptor, TUNSETOFFLOAD, sum(OFFLOADS[name] for name in names))
        except OSError:
            continue
        return frozenset(names)
    return frozenset()
