"""STUN for anyone, with RFC 5780 behaviour discovery, and what it may cost.

A stock request has 20 bytes and its answer 56 (IPv6: 92), the one answer of this server that is larger than
what was asked: 10 a second and source prefix, beyond which nothing is sent. Requests as long as their answer
amplify nothing and have a larger allowance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from crossedge.rendezvous.limits import BucketTable, prefix_key
from crossedge.rendezvous.settings import SourceLimits
from crossedge.wire import stun
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import WireError

PLAIN_REQUEST = b"\x00\x01\x00\x00"
"""Type and length of a Binding request without attributes."""


@dataclass(frozen=True, slots=True)
class Local:
    """One address and port of ours, as the cores see it; they number them in the order they were added."""

    bound: UdpEndpoint
    """Where it is bound; a wildcard where the address is not known."""
    public: UdpEndpoint | None
    """Where it is reached from outside, None where that is not known."""
    other_port: int | None = None
    """Number of the same address with the other port."""
    other_ip: int | None = None
    """Number of the other address with the same port."""
    other_both: int | None = None
    """Number of the other address with the other port."""


def address_group(
    hosts: tuple[str, ...], ports: tuple[int, int], base: int, public: Mapping[str, str] | None = None
) -> list[Local]:
    """Return the locals of one address, or of a first and an alternate one: two or four.

    Args:
        hosts: one address (or wildcard), or two.
        ports: the port and the one after it.
        base: the number that the first of them will have.
        public: local address -> the one it is reached at.
    """
    group: list[Local] = []
    for at, host in enumerate(hosts):
        for turn, port in enumerate(ports):
            seen = (public or {}).get(host, host)
            outside = None if seen in ("0.0.0.0", "::") else UdpEndpoint(seen, port)
            both = len(hosts) == 2
            group.append(
                Local(
                    UdpEndpoint(host, port),
                    outside,
                    base + 2 * at + (1 - turn),
                    base + 2 * (1 - at) + turn if both else None,
                    base + 2 * (1 - at) + (1 - turn) if both else None,
                )
            )
    return group


class StunAnswer(NamedTuple):
    """What a request gets."""

    datagram: bytes
    local: int
    """Number of the local to send it from."""
    destination: UdpEndpoint


class StunServer:
    """Answers Binding requests. Core: `answer` returns what to send from which local whereto, or nothing."""

    def __init__(self, limits: SourceLimits, random: Callable[[int], bytes]) -> None:
        self.locals: list[Local] = []
        self._stock = BucketTable(limits.slots, limits.stun_rate, limits.stun_rate, random)
        rate = limits.stun_padded_rate
        self._padded = BucketTable(limits.slots, rate, rate, random)
        self.dropped: Counter[str] = Counter()
        self.answered = 0

    def answer(self, datagram: bytes, source: UdpEndpoint, local: int, now: float) -> StunAnswer | None:
        """Return the answer to a STUN datagram, None where none is due."""
        target = source
        change_ip = change_port = False
        unknown: tuple[int, ...] = ()
        if len(datagram) == stun.HEADER and datagram[:4] == PLAIN_REQUEST:
            transaction = datagram[8:20]
        else:
            try:
                request = stun.decode(datagram)
            except WireError as error:
                self.dropped[f"stun-{error.reason}"] += 1
                return None
            if not isinstance(request, stun.Request):
                self.dropped["stun-not-request"] += 1
                return None
            transaction, unknown = request.transaction, request.unknown
            change_ip, change_port = request.change_ip, request.change_port
            if request.response_port is not None:
                target = UdpEndpoint(source.host, request.response_port)
        here = self.locals[local]
        sender: int | None = local
        if change_ip or change_port:
            sender = (here.other_both if change_port else here.other_ip) if change_ip else here.other_port
        if unknown or sender is None:
            reply = stun.encode_error(transaction, stun.UNKNOWN_ATTRIBUTE, unknown or (stun.CHANGE_REQUEST,))
            sender = local
        else:
            other = None if here.other_both is None else self.locals[here.other_both].public
            reply = stun.encode_success(transaction, source, self.locals[sender].public, other)
        table = self._stock if len(reply) > len(datagram) else self._padded
        if not table.take(prefix_key(source.host), now):
            self.dropped["stun-rate"] += 1
            return None
        self.answered += 1
        return StunAnswer(reply, sender, target)
