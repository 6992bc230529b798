"""Which prefix or address of a network is free: the lowest that overlaps nothing that was given out."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Final, TypeVar

from crossedge.wire.endpoint import Network

AnyNetwork = TypeVar("AnyNetwork", IPv4Network, IPv6Network)

RESERVED: Final = {
    "0.0.0.0/8": "this host (RFC 791)",
    "100.64.0.0/10": "shared by carrier-grade NATs (RFC 6598)",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local",
    "224.0.0.0/3": "multicast and reserved",
    "::/8": "loopback, unspecified and reserved",
    "fe80::/10": "link-local",
    "ff00::/8": "multicast",
}
"""What no network may take its addresses from."""


def free_prefix(supernet: AnyNetwork, length: int, taken: Iterable[Network]) -> AnyNetwork | None:
    """Return the lowest prefix of `length` inside `supernet` free of `taken`, or None."""
    first = int(supernet.network_address)
    last = int(supernet.broadcast_address)
    step = 1 << (supernet.max_prefixlen - length)
    at = first
    spans = sorted(
        (int(other.network_address), int(other.broadcast_address))
        for other in taken
        if other.version == supernet.version
    )
    for low, high in spans:
        if low >= at + step:
            break
        if high >= at:
            at = first + -(-(high + 1 - first) // step) * step
    if at + step - 1 > last:
        return None
    return type(supernet)((at, length))


def reserved(network: Network) -> str | None:
    """Return why a network's addresses may not be taken from here, naming the range, or None."""
    for text, why in RESERVED.items():
        block = IPv6Network(text) if ":" in text else IPv4Network(text)
        if block.version == network.version and block.overlaps(network):
            return f"{text}, {why}"
    return None
