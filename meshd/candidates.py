"""The endpoints at which this node may be tried: what its record and its calls offer.

A candidate comes from the host's own addresses, from what observers (rendezvous, STUN servers) saw, from a
port mapping, or from the configuration. What may never be aimed at (loopback, the mesh's own prefixes ...) is
refused here already, with its reason. A reflexive address is *confirmed* once two observers on different
hosts saw it: until then a lying rendezvous could have made it up, and peers send it a few packets only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from itertools import chain, islice
from typing import Final

from crossedge.wire.endpoint import Network, UdpEndpoint, refused_candidate
from crossedge.wire.identity import key_id
from crossedge.wire.limits import MAX_CANDIDATES
from crossedge.wire.record import Candidate, CandidateKind

MAX_OBSERVERS: Final = 8
MAX_STATIC: Final = 4
MAX_MAPPED: Final = 2
MAX_REFLEXIVE: Final = 4  # a hard NAT shows every observer another port
MAX_HOST_ADDRESSES: Final = 64  # of a host; what does not fit the record is left out in any case
MAX_REFUSED: Final = 64
MAX_REPORTED: Final = 4  # observations in one call (docs/protocol.md: `observed_by`)


def stun_observer(server: UdpEndpoint) -> bytes:
    """Return the 8-byte id under which a plain STUN server is an observer."""
    return key_id(str(server).encode())


class Candidates:
    """All candidates of one node; `current` is what to publish, the best first."""

    def __init__(self, port: int, mesh_prefixes: Iterable[Network] = ()) -> None:
        """`port` is that of our socket; `mesh_prefixes` are the network's own, never to be used."""
        self.port = port
        self.current: tuple[Candidate, ...] = ()
        self.refused: dict[str, str] = {}
        """Address or endpoint, and why it is no candidate."""
        self._mesh = tuple(mesh_prefixes)
        self._hosts: tuple[str, ...] = ()
        self._static: tuple[UdpEndpoint, ...] = ()
        self._mapped: tuple[UdpEndpoint, ...] = ()
        self._observed: dict[bytes, tuple[str, UdpEndpoint]] = {}

    def set_host_addresses(self, addresses: Iterable[str]) -> bool:
        """Take the host's addresses, favourites first; return whether `current` changed.

        Those that went away are forgotten, and observations with them only when their observer says so.
        """
        self._hosts = tuple(islice(dict.fromkeys(addresses), MAX_HOST_ADDRESSES))
        return self._select()

    def set_static(self, endpoints: Iterable[UdpEndpoint]) -> bool:
        """Take endpoints that are forwarded to us by hand; return whether `current` changed."""
        self._static = tuple(islice(dict.fromkeys(endpoints), MAX_STATIC))
        return self._select()

    def set_mapped(self, endpoints: Iterable[UdpEndpoint]) -> bool:
        """Take endpoints that a router maps to us; return whether `current` changed."""
        self._mapped = tuple(islice(dict.fromkeys(endpoints), MAX_MAPPED))
        return self._select()

    def observe(self, observer: bytes, host: str, endpoint: UdpEndpoint) -> bool:
        """Take what an observer saw; return whether `current` changed.

        Args:
            observer: its 8-byte id (of a rendezvous: its key id).
            host: its address. Observers on one address are not independent.
            endpoint: where it saw our socket.
        """
        self._observed.pop(observer, None)
        if len(self._observed) >= MAX_OBSERVERS:
            del self._observed[next(iter(self._observed))]
        self._observed[observer] = host, endpoint
        return self._select()

    def forget(self, observer: bytes) -> bool:
        """Forget what an observer saw; return whether `current` changed."""
        self._observed.pop(observer, None)
        return self._select()

    def confirmed(self, endpoint: UdpEndpoint) -> bool:
        """Tell whether the address (whatever the port) is ours beyond one observer's word."""
        if endpoint.host in self._hosts or any(endpoint.host == e.host for e in self._static + self._mapped):
            return True
        return len({host for host, seen in self._observed.values() if seen.host == endpoint.host}) > 1

    def observed_by(self) -> tuple[tuple[bytes, UdpEndpoint], ...]:
        """Return (observer, endpoint it saw), the newest first, as a call carries it."""
        newest = ((observer, seen) for observer, (_, seen) in reversed(self._observed.items()))
        return tuple(islice(newest, MAX_REPORTED))

    def _select(self) -> bool:
        self.refused.clear()
        own = [UdpEndpoint(host, self.port) for host in self._hosts]
        public = [endpoint for endpoint in own if _is_public(endpoint.host)]
        private = [endpoint for endpoint in own if not _is_public(endpoint.host)]
        reflexive = dict.fromkeys(seen for _, seen in reversed(self._observed.values()))
        ordered = chain(
            self._allowed(CandidateKind.STATIC, self._static),
            self._allowed(CandidateKind.MAPPED, self._mapped),
            # An address of ours that is seen unchanged is no reflexive one: there is no NAT before it.
            self._allowed(CandidateKind.HOST, public),
            self._allowed(CandidateKind.REFLEXIVE, list(reflexive)[:MAX_REFLEXIVE]),
            self._allowed(CandidateKind.HOST, private),
        )
        unique: dict[UdpEndpoint, Candidate] = {}
        for candidate in ordered:
            unique.setdefault(candidate.endpoint, candidate)
        before = self.current
        self.current = tuple(islice(unique.values(), MAX_CANDIDATES))
        return self.current != before

    def _allowed(self, kind: CandidateKind, endpoints: Sequence[UdpEndpoint]) -> list[Candidate]:
        allowed = []
        for endpoint in endpoints:
            reason = refused_candidate(endpoint.host, self._mesh)
            if reason is None:
                allowed.append(Candidate(kind, endpoint))
            elif len(self.refused) < MAX_REFUSED:
                self.refused[str(endpoint)] = reason
        return allowed


def _is_public(host: str) -> bool:
    try:
        return ip_address(host).is_global
    except ValueError:
        return False
