"""What a link's driver is asked to do of the work on packets (ethtool(8), "features"), by ioctl."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import socket
import struct
from collections.abc import Mapping

from crossedge.host.links import check_name
from crossedge.host.netlink import U32

SIOCETHTOOL = 0x8946
ETHTOOL_GSTRINGS = 0x1B
ETHTOOL_GSSET_INFO = 0x37
ETHTOOL_GFEATURES = 0x3A
ETHTOOL_SFEATURES = 0x3B
ETH_SS_FEATURES = 4
ETH_GSTRING_LEN = 32
IFREQ = struct.Struct("=16sQ8x" if ctypes.sizeof(ctypes.c_void_p) == 8 else "=16sI12x")
"""Name of the link, and where in memory the request is."""
SET_INFO = struct.Struct("=IIQI")
STRINGS = struct.Struct("=III")
HEAD = struct.Struct("=II")
GET_BLOCK = struct.Struct("=IIII")
"""Of 32 features: which there are, which were asked for, which are on, which can never change."""
SET_BLOCK = struct.Struct("=II")
"""Of 32 features: which to change, and which of them to switch on."""


def features(link: str) -> dict[str, bool]:
    """Return which features of a link that can change are on, by the kernel's names; raises `OSError`.

    The link is one of the calling thread's namespace.
    """
    names = _names(link)
    blocks = (len(names) + 31) // 32
    found = _call(link, HEAD.pack(ETHTOOL_GFEATURES, blocks) + bytes(GET_BLOCK.size * blocks))
    shown = {}
    for place, name in enumerate(names):
        block, bit = divmod(place, 32)
        there, _, on, never = GET_BLOCK.unpack_from(found, HEAD.size + GET_BLOCK.size * block)
        if name and there & ~never & 1 << bit:
            shown[name] = bool(on & 1 << bit)
    return shown


def set_features(link: str, wanted: Mapping[str, bool]) -> None:
    """Switch features of a link on and off, by the kernel's names.

    Raises `OSError`, and `KeyError` for a name that this kernel does not have. What a driver has to have
    otherwise it leaves so without an error: look at `features` again.
    """
    names = _names(link)
    masks = [[0, 0] for _ in range((len(names) + 31) // 32)]
    for name, on in wanted.items():
        if name not in names:
            raise KeyError(name)
        block, bit = divmod(names.index(name), 32)
        masks[block][0] |= 1 << bit
        masks[block][1] |= on << bit
    body = b"".join(SET_BLOCK.pack(*mask) for mask in masks)
    _call(link, HEAD.pack(ETHTOOL_SFEATURES, len(masks)) + body)


@functools.cache
def _names(link: str) -> tuple[str, ...]:
    """Return the names of all features, by their number: the same for all links of a kernel."""
    found = _call(link, SET_INFO.pack(ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0))
    (count,) = U32.unpack_from(found, SET_INFO.size - U32.size)
    request = STRINGS.pack(ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count) + bytes(ETH_GSTRING_LEN * count)
    text = _call(link, request)[STRINGS.size :]
    return tuple(
        text[start : start + ETH_GSTRING_LEN].partition(b"\0")[0].decode(errors="replace")
        for start in range(0, ETH_GSTRING_LEN * count, ETH_GSTRING_LEN)
    )


def _call(link: str, request: bytes) -> bytes:
    """Return what the kernel makes of a request's memory."""
    memory = ctypes.create_string_buffer(request, len(request))
    packed = IFREQ.pack(check_name(link).encode(), ctypes.addressof(memory))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        fcntl.ioctl(control, SIOCETHTOOL, packed)
    return memory.raw
