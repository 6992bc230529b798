"""From what STUN showed to what the NAT is, in the words of RFC 4787, each finding with its reason.

The tests are those of RFC 5780 (4.3 mapping, 4.4 filtering). Where a second address to ask was missing the
finding is the one that costs least if it is wrong, and the reason says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from statistics import median
from typing import Final, NamedTuple

from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.record import Allocation, Behaviour, NatVerdict

SEQUENTIAL_SPREAD: Final = (
    100  # ports: fresh sockets whose ports lie this close together were given them in order
)


class Finding(NamedTuple):
    """One line of the report."""

    topic: str
    value: str
    why: str


@dataclass(slots=True)
class Evidence:
    """What was seen."""

    own_hosts: frozenset[str] = frozenset()
    """The host's own addresses."""
    ports: Sequence[int] = ()
    """The local port of each socket."""
    mapped: dict[UdpEndpoint, UdpEndpoint] = field(default_factory=dict)
    """The main socket: server endpoint that was asked -> where it saw us."""
    fresh: dict[int, UdpEndpoint] = field(default_factory=dict)
    """Sockets that spoke to one server endpoint only -> where it saw them."""
    filter_tested: bool = False
    """Whether the socket of the filtering tests got an answer at all."""
    address_passed: bool | None = None
    """Whether an answer from another address and port came in; None: nobody could send one."""
    port_passed: bool | None = None
    """Whether an answer from the same address and another port came in; None: as above."""
    hairpin: bool | None = None

    @property
    def translated(self) -> bool | None:
        """Whether there is a NAT; None if nobody answered."""
        if not self.mapped:
            return None
        own = {UdpEndpoint(host, self.ports[0]) for host in self.own_hosts}
        return any(seen not in own for seen in self.mapped.values())


def judge(evidence: Evidence) -> tuple[NatVerdict, tuple[Finding, ...]]:
    """Return the verdict, and its findings in the order mapping, filtering, allocation, hairpin, lifetime."""
    if evidence.translated is None:
        why = "no STUN server answered: UDP may be blocked"
        return NatVerdict(), (Finding("mapping", "unknown", why),)
    mapping, mapping_why = _mapping(evidence)
    filtering, filtering_why = _filtering(evidence)
    allocation, allocation_why = _allocation(evidence)
    hairpin_why = {
        None: "not tested" if evidence.translated else "there is no NAT to turn packets round",
        True: "a packet to our own outer endpoint came back in",
        False: "no packet to our own outer endpoint came back in",
    }[evidence.hairpin]
    hairpin = {None: "unknown", True: "yes", False: "no"}[evidence.hairpin]
    return NatVerdict(mapping, filtering, allocation, evidence.hairpin), (
        Finding("mapping", _text(mapping), mapping_why),
        Finding("filtering", _text(filtering), filtering_why),
        Finding("allocation", _text(allocation), allocation_why),
        Finding("hairpin", hairpin, hairpin_why),
        Finding("lifetime", "unknown", "measured in the background: it takes two minutes"),
    )


def _text(value: Behaviour | Allocation) -> str:
    return value.name.lower().replace("_", "-")


def _mapping(evidence: Evidence) -> tuple[Behaviour, str]:
    seen = evidence.mapped
    if not evidence.translated:
        return Behaviour.NONE, "servers see our own address and port: there is no NAT"
    pairs = list(combinations(seen, 2))
    for one, two in pairs:
        if one.host == two.host and seen[one] != seen[two]:
            return (
                Behaviour.ADDRESS_AND_PORT_DEPENDENT,
                f"{one} sees {seen[one]}, another port of it ({two.port}) sees {seen[two]}",
            )
    same_host_asked = {one.host for one, two in pairs if one.host == two.host}
    for one, two in pairs:
        if seen[one] != seen[two]:
            what = f"{one} sees {seen[one]}, {two} sees {seen[two]}"
            if same_host_asked:
                return Behaviour.ADDRESS_DEPENDENT, f"{what}; two ports of one address see the same"
            return (
                Behaviour.ADDRESS_AND_PORT_DEPENDENT,
                f"{what}; no second port answered, so the worst is taken",
            )
    endpoint = next(iter(seen.values()))
    if len({server.host for server in seen}) > 1:
        return Behaviour.ENDPOINT_INDEPENDENT, f"{len(seen)} endpoints of {_hosts(seen)} all see {endpoint}"
    if len(seen) > 1:
        return (
            Behaviour.ENDPOINT_INDEPENDENT,
            f"both ports of {next(iter(seen)).host} see {endpoint}; there was no second address to ask",
        )
    return Behaviour.UNKNOWN, f"only {next(iter(seen))} answered, it sees {endpoint}"


def _hosts(seen: Mapping[UdpEndpoint, UdpEndpoint]) -> str:
    return ", ".join(sorted({server.host for server in seen}))


def _filtering(evidence: Evidence) -> tuple[Behaviour, str]:
    if not evidence.filter_tested:
        return Behaviour.UNKNOWN, "the socket of this test got no answer"
    if evidence.address_passed:
        if evidence.translated:
            return Behaviour.ENDPOINT_INDEPENDENT, "an answer from an address never sent to came in"
        return Behaviour.NONE, "an answer from an address never sent to came in, and there is no NAT"
    if evidence.port_passed:
        what = "an answer from another port of an address that was sent to came in"
        if evidence.address_passed is None:
            return Behaviour.ADDRESS_DEPENDENT, f"{what}; no server could answer from another address"
        return Behaviour.ADDRESS_DEPENDENT, f"{what}, one from another address did not"
    if evidence.port_passed is None:
        return Behaviour.UNKNOWN, "no server could answer from elsewhere"
    return Behaviour.ADDRESS_AND_PORT_DEPENDENT, "no answer from another port or address came in"


def _allocation(evidence: Evidence) -> tuple[Allocation, str]:
    fresh = evidence.fresh
    kept = sum(seen.port == evidence.ports[local] for local, seen in fresh.items())
    if fresh:
        if 2 * kept > len(fresh):
            return Allocation.PRESERVING, f"{kept} of {len(fresh)} fresh sockets kept their port"
        ports = [fresh[local].port for local in sorted(fresh)]
        shown = ", ".join(map(str, ports))
        if len(ports) < 2:
            return Allocation.UNKNOWN, f"one fresh socket got port {shown}"
        if max(ports) - min(ports) <= SEQUENTIAL_SPREAD:
            return Allocation.SEQUENTIAL, f"fresh sockets got ports {shown}"
        return Allocation.RANDOM, f"fresh sockets got ports {shown}"
    if any(seen.port == evidence.ports[0] for seen in evidence.mapped.values()):
        return Allocation.PRESERVING, f"our port {evidence.ports[0]} is kept"
    return Allocation.UNKNOWN, "no fresh socket got an answer"


def port_step(ports: Sequence[int]) -> int:
    """Return the usual distance between consecutive ports of fresh sockets (0 for fewer than two)."""
    return round(median(b - a for a, b in pairwise(ports))) if len(ports) > 1 else 0
