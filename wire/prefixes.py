"""Addresses and prefixes as certificates carry them.

A prefix is its address (4 or 16 bytes, host bits zero) followed by one byte of length.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import combinations

from crossedge.wire.endpoint import Network
from crossedge.wire.errors import WireError


def pack_optional_address(address: IPv4Address | IPv6Address | None) -> bytes:
    """Return the bytes of an address, b"" for none."""
    return b"" if address is None else address.packed


def unpack_v4(packed: object) -> IPv4Address | None:
    """Return the address in 4 untrusted bytes, None for b""; raises only `WireError`."""
    if type(packed) is not bytes or len(packed) not in (0, 4):
        raise WireError("bad-address", "4 bytes")
    return IPv4Address(packed) if packed else None


def unpack_v6(packed: object) -> IPv6Address | None:
    """Return the address in 16 untrusted bytes, None for b""; raises only `WireError`."""
    if type(packed) is not bytes or len(packed) not in (0, 16):
        raise WireError("bad-address", "16 bytes")
    return IPv6Address(packed) if packed else None


def pack_prefix(prefix: Network) -> bytes:
    """Return the 5 or 17 bytes of a prefix."""
    return prefix.network_address.packed + bytes([prefix.prefixlen])


def unpack_prefix(packed: object) -> Network:
    """Return the prefix in 5 or 17 untrusted bytes; raises only `WireError`."""
    if type(packed) is not bytes or len(packed) not in (5, 17):
        raise WireError("bad-prefix", "a prefix has 5 or 17 bytes")
    try:
        if len(packed) == 5:
            return IPv4Network((packed[:4], packed[4]))
        return IPv6Network((packed[:16], packed[16]))
    except ValueError:
        raise WireError("bad-prefix", "length or host bits") from None


def pack_prefixes(prefixes: Sequence[Network]) -> list[bytes]:
    """Return prefixes as an array of packed ones."""
    return [pack_prefix(prefix) for prefix in prefixes]


def unpack_prefixes(items: object) -> tuple[Network, ...]:
    """Return the prefixes in an untrusted array of at most 16; raises only `WireError`."""
    if type(items) is not tuple or len(items) > 16:
        raise WireError("bad-prefix", "at most 16 prefixes")
    return tuple(unpack_prefix(item) for item in items)


def overlapping(prefixes: Sequence[Network]) -> tuple[Network, Network] | None:
    """Return two of the prefixes that overlap, or None."""
    for one, other in combinations(prefixes, 2):
        if overlap(one, other):
            return one, other
    return None


def overlap(one: Network, other: Network) -> bool:
    """Tell whether two prefixes of either family share an address."""
    if isinstance(one, IPv4Network):
        return isinstance(other, IPv4Network) and one.overlaps(other)
    return isinstance(other, IPv6Network) and one.overlaps(other)
