"""One model of a NAT, without I/O: packets' addresses and the time in, translated addresses out.

It drives the in-memory internet and the namespace router alike. Terms are those of RFC 4787. A packet is only
(source, destination) here; one instance serves one protocol. `None` means the packet is dropped, counted in
`dropped` under a name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from crossedge.lab.conntrack import ConntrackNat, Firewall
from crossedge.lab.natkinds import (
    KINDS,
    Address,
    Allocation,
    Behaviour,
    Collision,
    Hairpin,
    NatKind,
    kind,
)

__all__ = ["KINDS", "Address", "ConntrackNat", "Firewall", "Nat", "NatKind", "RfcNat", "kind", "make_nat"]

RANDOM_DRAWS = 64  # random ports tried before the search goes in order
STREAM_AFTER = (
    2.0  # Linux nf_conntrack_proto_udp.c: a flow this old that was answered lives for the long time
)


class Nat(Protocol):
    """What every NAT here can do."""

    kind: NatKind
    dropped: Counter[str]

    @property
    def addresses(self) -> Sequence[str]:
        """The outer addresses."""

    def translate_out(self, src: Address, dst: Address, now: float) -> Address | None:
        """Translate the source of a packet from inside; return its outer endpoint."""

    def translate_in(self, src: Address, dst: Address, now: float) -> Address | None:
        """Translate the destination of a packet from outside; return the inner endpoint."""

    def hairpin(self, src: Address, dst: Address, now: float) -> tuple[Address, Address] | None:
        """Translate a packet from inside to an outer endpoint; return its new (source, destination)."""

    def inner_of(self, outer: Address, remote: Address, now: float) -> Address | None:
        """Return who sends from `outer` to `remote`, without refreshing anything (for ICMP errors)."""

    def sessions(self, now: float) -> int:
        """Return how many (mapping, remote endpoint) pairs are alive."""

    def reboot(self) -> None:
        """Forget everything, as a router does that lost its power."""

    def readdress(self, addresses: Sequence[str]) -> None:
        """Take other outer addresses; what was mapped is lost."""


def make_nat(kind: NatKind, addresses: Sequence[str], below: Callable[[int], int]) -> Nat:
    """Return a NAT of this kind with these outer addresses; `below(n)` draws an integer of 0 <= x < n."""
    if not kind.translates:
        return Firewall(kind)
    if kind.conntrack is not None:
        return ConntrackNat(kind, addresses, below)
    return RfcNat(kind, addresses, below)


class _Mapping:
    """One inner endpoint's place outside, and the remote endpoints that it was used for."""

    __slots__ = ("expires", "inner", "key", "outer", "remotes", "replied")

    def __init__(self, key: tuple[object, ...], inner: Address, outer: Address) -> None:
        self.key = key
        self.inner = inner
        self.outer = outer
        self.expires = 0.0
        self.replied = False
        self.remotes: dict[Address, float] = {}

    def admits(self, remote: Address, filtering: Behaviour, now: float) -> bool:
        """Tell whether the filter lets `remote` in."""
        if filtering is Behaviour.ENDPOINT_INDEPENDENT:
            return True
        if filtering is Behaviour.ADDRESS_AND_PORT_DEPENDENT:
            return self.remotes.get(remote, now) > now
        return any(host == remote[0] and expires > now for (host, _), expires in self.remotes.items())


class RfcNat:
    """Mapping, filtering and allocation as RFC 4787 takes them apart."""

    def __init__(self, kind: NatKind, addresses: Sequence[str], below: Callable[[int], int]) -> None:
        if not addresses:
            raise ValueError(f"NAT {kind.name}: needs an outer address")
        self.kind = kind
        self.dropped: Counter[str] = Counter()
        self._addresses = tuple(addresses)
        self._below = below
        low, high = kind.ports
        self._next_port = low + below(high - low + 1)
        self._drifted = 0.0
        self._swept = 0.0
        self._by_key: dict[tuple[object, ...], _Mapping] = {}
        self._by_outer: dict[Address, list[_Mapping]] = {}
        self._paired: dict[str, str] = {}
        self._sessions = 0
        self._per_host: Counter[str] = Counter()

    @property
    def addresses(self) -> Sequence[str]:
        """The outer addresses."""
        return self._addresses

    def translate_out(self, src: Address, dst: Address, now: float) -> Address | None:
        """Translate the source of a packet from inside, making a mapping where there is none."""
        self._sweep(now)
        key = self._key(src, dst)
        mapping = self._by_key.get(key)
        if mapping is not None and mapping.expires <= now:
            self._forget(mapping)
            mapping = None
        if mapping is None or dst not in mapping.remotes:
            if not self._room(src[0], now):
                return None
            if mapping is None:
                mapping = self._allocate(key, src, dst, now)
                if mapping is None:
                    self.dropped["no-port"] += 1
                    return None
            self._sessions += 1
            self._per_host[src[0]] += 1
        mapping.expires = mapping.remotes[dst] = now + self._lifetime(mapping)
        return mapping.outer

    def translate_in(self, src: Address, dst: Address, now: float) -> Address | None:
        """Translate the destination of a packet from outside, if its mapping's filter lets it in."""
        mapping = self._find(src, dst, now)
        if isinstance(mapping, str):
            self.dropped[mapping] += 1
            return None
        mapping.replied = True
        if self.kind.refresh_inbound:
            mapping.expires = now + self._lifetime(mapping)
            if src in mapping.remotes:
                mapping.remotes[src] = mapping.expires
        return mapping.inner

    def hairpin(self, src: Address, dst: Address, now: float) -> tuple[Address, Address] | None:
        """Translate a packet from inside to one of our outer endpoints."""
        if self.kind.hairpin is Hairpin.NONE:
            self.dropped["hairpin"] += 1
            return None
        outer = self.translate_out(src, dst, now)
        inner = None if outer is None else self.translate_in(outer, dst, now)
        if outer is None or inner is None:
            return None
        return (outer if self.kind.hairpin is Hairpin.EXTERNAL else src), inner

    def inner_of(self, outer: Address, remote: Address, now: float) -> Address | None:
        """Return who sends from `outer` to `remote`, without refreshing anything."""
        for mapping in self._by_outer.get(outer, ()):
            if mapping.remotes.get(remote, now) > now:
                return mapping.inner
        return None

    def sessions(self, now: float) -> int:
        """Return how many (mapping, remote endpoint) pairs are alive."""
        return sum(expires > now for m in self._by_key.values() for expires in m.remotes.values())

    def reboot(self) -> None:
        """Forget every mapping; a sequence starts at another place."""
        low, high = self.kind.ports
        self._next_port = low + self._below(high - low + 1)
        self._by_key.clear()
        self._by_outer.clear()
        self._paired.clear()
        self._per_host.clear()
        self._sessions = 0

    def readdress(self, addresses: Sequence[str]) -> None:
        """Take other outer addresses; what was mapped is lost."""
        self._addresses = tuple(addresses)
        self.reboot()

    def _key(self, src: Address, dst: Address) -> tuple[object, ...]:
        if self.kind.mapping is Behaviour.ENDPOINT_INDEPENDENT:
            return src
        if self.kind.mapping is Behaviour.ADDRESS_DEPENDENT:
            return src, dst[0]
        return src, dst

    def _lifetime(self, mapping: _Mapping) -> float:
        short = self.kind.lifetime_unreplied
        return self.kind.lifetime if short is None or mapping.replied else short

    def _find(self, src: Address, dst: Address, now: float) -> _Mapping | str:
        reason = "no-mapping"
        for mapping in self._by_outer.get(dst, ()):
            if mapping.expires <= now:
                continue
            if mapping.admits(src, self.kind.filtering, now):
                return mapping
            reason = "filtered"
        return reason

    def _room(self, host: str, now: float) -> bool:
        """Tell whether one more session is allowed, after looking for dead ones at most once a second."""
        full = self._sessions >= self.kind.sessions or self._per_host[host] >= self.kind.sessions_per_host
        if full and now - self._swept >= 1.0:
            self._sweep(now, force=True)
            full = self._sessions >= self.kind.sessions or self._per_host[host] >= self.kind.sessions_per_host
        if full:
            self.dropped["sessions"] += 1
        return not full

    def _sweep(self, now: float, force: bool = False) -> None:
        """Drop what has expired, now and then."""
        if not force and now - self._swept < self.kind.lifetime:
            return
        self._swept = now
        for mapping in [m for m in self._by_key.values() if m.expires <= now]:
            self._forget(mapping)
        for mapping in self._by_key.values():
            dead = [remote for remote, expires in mapping.remotes.items() if expires <= now]
            for remote in dead:
                del mapping.remotes[remote]
            self._sessions -= len(dead)
            self._per_host[mapping.inner[0]] -= len(dead)

    def _forget(self, mapping: _Mapping) -> None:
        del self._by_key[mapping.key]
        sharers = self._by_outer[mapping.outer]
        sharers.remove(mapping)
        if not sharers:
            del self._by_outer[mapping.outer]
        self._sessions -= len(mapping.remotes)
        self._per_host[mapping.inner[0]] -= len(mapping.remotes)

    def _free(self, outer: Address, dst: Address, now: float) -> bool:
        sharers = self._by_outer.get(outer)
        if sharers is None:
            return True
        for mapping in [m for m in sharers if m.expires <= now]:
            self._forget(mapping)
        return len(sharers) < self.kind.overload and all(dst not in m.remotes for m in sharers)

    def _allocate(self, key: tuple[object, ...], src: Address, dst: Address, now: float) -> _Mapping | None:
        outer = self._choose(self._address_for(src[0]), src[1], dst, now)
        if outer is None:
            return None
        mapping = _Mapping(key, src, outer)
        self._by_key[key] = mapping
        self._by_outer.setdefault(outer, []).append(mapping)
        return mapping

    def _address_for(self, host: str) -> str:
        if len(self._addresses) == 1:
            return self._addresses[0]
        if self.kind.arbitrary_pooling:
            return self._addresses[self._below(len(self._addresses))]
        if host not in self._paired:
            self._paired[host] = self._addresses[self._below(len(self._addresses))]
        return self._paired[host]

    def _choose(self, address: str, wanted: int, dst: Address, now: float) -> Address | None:
        if self.kind.allocation is Allocation.PRESERVING:
            outer = (address, wanted)
            if self._free(outer, dst, now):
                return outer
            if self.kind.collision is Collision.REFUSE:
                return None
            if self.kind.collision is Collision.STEAL:
                for mapping in list(self._by_outer[outer]):
                    self._forget(mapping)
                return outer
            ports = self._in_order(wanted + 1, 1) if self.kind.collision is Collision.NEXT else self._drawn()
        elif self.kind.allocation is Allocation.SEQUENTIAL:
            ports = self._in_order(self._drift(now), self.kind.step)
        else:
            ports = self._drawn()
        for port in ports:
            if self.kind.parity and (port ^ wanted) & 1:
                continue
            if self._free((address, port), dst, now):
                if self.kind.allocation is Allocation.SEQUENTIAL:
                    self._next_port = port + self.kind.step
                return address, port
        return None

    def _drift(self, now: float) -> int:
        """Return where the sequence stands after what the neighbours took since the last look."""
        taken = (now - self._drifted) * self.kind.drift
        self._drifted = now
        extra = int(min(taken, 65_536.0)) + (self._below(1 << 20) < (taken % 1.0) * (1 << 20))
        return self._next_port + extra * self.kind.step

    def _in_order(self, start: int, step: int) -> Iterator[int]:
        low, high = self.kind.ports
        size = high - low + 1
        for offset in range(step):  # with a step above 1, the ports in between come last
            for index in range((size + step - 1 - offset) // step):
                yield low + (start - low + offset + index * step) % size

    def _drawn(self) -> Iterator[int]:
        low, high = self.kind.ports
        for _ in range(RANDOM_DRAWS):
            yield low + self._below(high - low + 1)
        yield from self._in_order(low + self._below(high - low + 1), 1)
