"""What a NAT does, in the words of RFC 4787, and a table of the kinds that are met in the field."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

Address = tuple[str, int]
"""(host, port); a `UdpEndpoint` is one. For ICMP echo the identifier stands for the port."""


class Behaviour(StrEnum):
    """What a mapping (RFC 4787, 4.1) or a filter (section 5) depends on, beside the inner endpoint."""

    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ADDRESS_DEPENDENT = "address-dependent"
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"


class Allocation(StrEnum):
    """How the outer port of a new mapping is chosen (RFC 4787, 4.2.1)."""

    PRESERVING = "preserving"
    SEQUENTIAL = "sequential"
    RANDOM = "random"


class Collision(StrEnum):
    """What a port-preserving NAT does when the port it wants is taken."""

    NEXT = "next"
    """Take the next free port."""
    RANDOM = "random"
    """Take a random free port."""
    STEAL = "steal"
    """Give the port to the newcomer: "port overloading", which RFC 4787 REQ-3 forbids and some do."""
    REFUSE = "refuse"
    """Make no mapping."""


class Hairpin(StrEnum):
    """What happens to a packet from inside to an outer endpoint of the same NAT (RFC 4787, section 6)."""

    NONE = "none"
    EXTERNAL = "external"
    """Delivered with the sender's outer endpoint as its source: what REQ-9 asks for."""
    INTERNAL = "internal"
    """Delivered with the sender's inner endpoint as its source."""


class Conntrack(StrEnum):
    """How a Linux router treats new packets that arrive on its WAN side for itself."""

    DROP = "drop"
    """Refused by the firewall before connection tracking confirms them: nothing is remembered."""
    ACCEPT = "accept"
    """Accepted, though nothing listens: a conntrack entry is made that takes the tuple of a later punch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NatKind:
    """One way to be a NAT. Times are in seconds."""

    name: str
    about: str
    mapping: Behaviour = Behaviour.ENDPOINT_INDEPENDENT
    filtering: Behaviour = Behaviour.ADDRESS_AND_PORT_DEPENDENT
    allocation: Allocation = Allocation.PRESERVING
    collision: Collision = Collision.NEXT
    hairpin: Hairpin = Hairpin.NONE
    parity: bool = False
    """Keep even ports even and odd ports odd (RFC 4787 REQ-4)."""
    step: int = 1
    """Distance between the ports of sequential allocation."""
    drift: float = 0.0
    """Mappings per second that other customers of a shared NAT make: they move a sequence."""
    lifetime: float = 120.0
    """A mapping that is not refreshed for this long is forgotten (RFC 4787 REQ-5 asks for 120 s)."""
    lifetime_unreplied: float | None = None
    """Lifetime until the first packet from outside was let in; None: `lifetime`."""
    refresh_inbound: bool = False
    """Packets from outside refresh the mapping too (REQ-6 asks for outbound and allows inbound)."""
    overload: int = 1
    """How many mappings to different remote endpoints may share one outer port."""
    sessions: int = 65_536
    """Most (mapping, remote endpoint) pairs at one time; a packet that needs one more is dropped."""
    sessions_per_host: int = 65_536
    """The same for one inner address."""
    ports: tuple[int, int] = (1024, 65_535)
    """First and last outer port for allocation."""
    arbitrary_pooling: bool = False
    """With several outer addresses: one inner host may get several (RFC 4787 REQ-2 asks for one)."""
    conntrack: Conntrack | None = None
    """A Linux netfilter NAT: tracks connections by full tuple; `mapping` and `filtering` are not read."""
    translates: bool = True
    """False: a stateful firewall that filters and leaves addresses alone."""

    def __post_init__(self) -> None:
        low, high = self.ports
        if not 0 < low <= high <= 65_535:
            raise ValueError(f"NAT kind {self.name}: ports {low}-{high} are not a range within 1-65535")
        for what in ("step", "overload", "sessions", "sessions_per_host"):
            if getattr(self, what) < 1:
                raise ValueError(f"NAT kind {self.name}: {what} must be 1 or more")
        tightest = Behaviour.ADDRESS_AND_PORT_DEPENDENT
        if self.overload > 1 and (self.mapping, self.filtering) != (tightest, tightest):
            raise ValueError(f"NAT kind {self.name}: overload needs mapping and filtering {tightest}")

    @property
    def hard(self) -> bool:
        """Tell whether the outer port towards a new peer differs from the one that a STUN server sees."""
        if self.conntrack is not None:
            return self.allocation is not Allocation.PRESERVING
        return self.translates and self.mapping is not Behaviour.ENDPOINT_INDEPENDENT


_EI = Behaviour.ENDPOINT_INDEPENDENT
_AD = Behaviour.ADDRESS_DEPENDENT
_APD = Behaviour.ADDRESS_AND_PORT_DEPENDENT

_LINUX = NatKind(
    name="linux",
    about="netfilter masquerade as home routers have it: new input from the WAN is dropped",
    conntrack=Conntrack.DROP,
    collision=Collision.RANDOM,
    lifetime_unreplied=30.0,
    refresh_inbound=True,
)

KINDS: dict[str, NatKind] = {
    kind.name: kind
    for kind in (
        NatKind(name="full-cone", about="anyone may answer on the mapping (RFC 3489)", filtering=_EI),
        NatKind(name="restricted-cone", about="hosts that were sent to may answer", filtering=_AD),
        NatKind(name="port-restricted", about="endpoints that were sent to may answer: most home routers"),
        NatKind(
            name="port-restricted-random",
            about="as port-restricted, on a random port that stays the same for all peers",
            allocation=Allocation.RANDOM,
        ),
        NatKind(
            name="hairpinning",
            about="what RFC 4787 asks of a NAT: independent mapping, address filter, hairpin, parity",
            filtering=_AD,
            hairpin=Hairpin.EXTERNAL,
            parity=True,
            refresh_inbound=True,
            lifetime=300.0,
        ),
        NatKind(
            name="hairpinning-internal",
            about="hairpins with the inner source, which RFC 4787 REQ-9 forbids",
            hairpin=Hairpin.INTERNAL,
        ),
        NatKind(
            name="short-lived",
            about="forgets after 20 s; only outbound packets refresh",
            lifetime=20.0,
            allocation=Allocation.SEQUENTIAL,
        ),
        NatKind(
            name="port-stealing",
            about="the last host to use a port gets it, the others go dark (port overloading)",
            collision=Collision.STEAL,
        ),
        NatKind(
            name="carrier-grade",
            about="RFC 6888: independent, hairpin, several addresses, few sessions for each subscriber",
            filtering=_EI,
            allocation=Allocation.RANDOM,
            hairpin=Hairpin.EXTERNAL,
            sessions_per_host=1_000,
        ),
        NatKind(
            name="address-symmetric",
            about="a new mapping for each remote address",
            mapping=_AD,
            filtering=_AD,
            allocation=Allocation.SEQUENTIAL,
        ),
        NatKind(
            name="symmetric-sequential",
            about="a new mapping for each remote endpoint, ports in order: predictable",
            mapping=_APD,
            allocation=Allocation.SEQUENTIAL,
        ),
        NatKind(
            name="symmetric-busy",
            about="ports in order, two apart, while other customers take some: harder to predict",
            mapping=_APD,
            allocation=Allocation.SEQUENTIAL,
            step=2,
            drift=10.0,
        ),
        NatKind(
            name="symmetric-random",
            about="a new random port for each remote endpoint: a birthday is needed",
            mapping=_APD,
            allocation=Allocation.RANDOM,
        ),
        NatKind(
            name="symmetric-overloading",
            about="as symmetric-random, and endpoints to different peers share outer ports",
            mapping=_APD,
            allocation=Allocation.RANDOM,
            overload=16,
            ports=(20_000, 22_047),
        ),
        NatKind(
            name="corporate",
            about="symmetric, random, forgets after 30 s, a small session table",
            mapping=_APD,
            allocation=Allocation.RANDOM,
            lifetime=30.0,
            sessions=2_000,
            sessions_per_host=256,
        ),
        _LINUX,
        replace(
            _LINUX,
            name="linux-accepting",
            about="netfilter masquerade that accepts WAN input and so makes wrong conntrack entries",
            conntrack=Conntrack.ACCEPT,
        ),
        NatKind(
            name="linux-random",
            about="netfilter masquerade random: a random port for each connection",
            conntrack=Conntrack.DROP,
            allocation=Allocation.RANDOM,
            lifetime_unreplied=30.0,
            refresh_inbound=True,
        ),
        NatKind(
            name="firewall",
            about="no translation; lets in what answers something that went out (IPv6 at home)",
            translates=False,
            refresh_inbound=True,
            lifetime_unreplied=30.0,
        ),
        NatKind(
            name="open",
            about="no translation and no filter",
            translates=False,
            filtering=_EI,
        ),
    )
}


def kind(name: str) -> NatKind:
    """Return the named kind; ValueError names the kinds that there are."""
    try:
        return KINDS[name]
    except KeyError:
        raise ValueError(f"no NAT kind {name!r}; there are {', '.join(KINDS)}") from None
