"""Who may talk to whom through the tunnel, by inner addresses.

What leaves must come from an address of ours and go to one that belongs to a peer; what a peer sends must
come from an address that is its own (its certificate's prefixes are in the allowed IPs) and go to one of
ours. So a peer can neither borrow an address nor reach our LAN through us. Answers are remembered per pair
of addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.link import Link
from crossedge.meshd.packet import is_unicast

CACHED_PAIRS: Final = 4096
NO_PEER: Final = "outbound-no-peer"
"""The verdict on a packet of ours for an address that nobody known has."""


class Policy:
    """The judge of inner addresses. A verdict is a link, or the reason (a counter's name) for a drop."""

    __slots__ = ("_allowed", "_inbound", "_outbound", "_own")

    def __init__(self, allowed: AllowedIPs[Link], own: AllowedIPs[bool]) -> None:
        """Take the peers' networks and ours; both may change at any time."""
        self._allowed = allowed
        self._own = own
        self._inbound: dict[bytes, Link | str] = {}
        self._outbound: dict[bytes, Link | str] = {}
        self.watch(self._inbound.clear)
        self.watch(self._outbound.clear)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever verdicts may become others, and what was concluded from them is void."""
        self._allowed.watch(changed)
        self._own.watch(changed)

    def outbound(self, addresses: bytes) -> Link | str:
        """Judge a packet that wants to leave, by its packed source and destination, joined."""
        verdict = self._outbound.get(addresses)
        if verdict is None:
            verdict = self._judge_outbound(*_halves(addresses))
            _remember(self._outbound, addresses, verdict)
        return verdict

    def inbound(self, addresses: bytes) -> Link | str:
        """Judge a packet that arrived: returns the only link that it may have come through."""
        verdict = self._inbound.get(addresses)
        if verdict is None:
            verdict = self._judge_inbound(*_halves(addresses))
            _remember(self._inbound, addresses, verdict)
        return verdict

    def _judge_outbound(self, source: bytes, destination: bytes) -> Link | str:
        if not is_unicast(destination):
            return "outbound-multicast"
        if not self._own.lookup(source):
            return "outbound-source"
        return self._allowed.lookup(destination) or NO_PEER

    def _judge_inbound(self, source: bytes, destination: bytes) -> Link | str:
        if not is_unicast(source) or self._own.lookup(source):
            return "inner-source"
        link = self._allowed.lookup(source)
        if link is None:
            return "inner-source"
        if not is_unicast(destination):
            return "inner-multicast"
        return link if self._own.lookup(destination) else "inner-destination"


def _halves(addresses: bytes) -> tuple[bytes, bytes]:
    half = len(addresses) // 2
    return addresses[:half], addresses[half:]


def _remember(cache: dict[bytes, Link | str], addresses: bytes, verdict: Link | str) -> None:
    if len(cache) >= CACHED_PAIRS:
        cache.clear()
    cache[addresses] = verdict
