"""What the nodes reported: verified, put together again from changes, one entry per node.

A report is either believed and applied as a whole, or changes nothing: `WireError` says why it is not
believed, `NeedsFull` that its base is not here. Ages are carried on by the receiver's clock, so a node whose
clock is a little wrong does no harm; one whose clock is far off is told so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from crossedge.latency.report import Coordinates, Pair, PairState, Report
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.certificate import Certificate
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.identity import network_id

MAX_SKEW: Final = 300.0
"""Seconds that a report's clock may be off."""
MAX_NODES: Final = 16_384


@dataclass(slots=True)
class Reported:
    """The present state of one node's reports."""

    certificate: Certificate
    epoch: bytes
    seq: int
    issued: int
    """Unix seconds, by the node's clock."""
    interval: int
    """Seconds after which its next report is meant to come."""
    received: float
    """`now` of the receiver."""
    coordinates: Coordinates | None
    pairs: dict[bytes, Pair] = field(default_factory=dict)
    """Peer's node id to what was measured; a peer that is not here is unmeasured."""
    measured: dict[bytes, float] = field(default_factory=dict)
    """Peer's node id to when that was, by `now` of the receiver."""

    @property
    def name(self) -> str:
        """The node's name."""
        return self.certificate.name

    def age(self, peer: bytes, now: float) -> float:
        """Return the seconds since a pair was measured; KeyError where it is not."""
        return max(0.0, now - self.measured[peer])


@dataclass(frozen=True, slots=True)
class Applied:
    """A report that was believed."""

    report: Report
    changes: tuple[Pair, ...]
    """Pairs that are new or changed, and those that were forgotten (state FORGOTTEN)."""
    restarted: bool
    """Whether the node is new, or another instance than at its last report."""
    duplicate: bool = False
    """Whether it was applied before; then nothing changed."""


@dataclass(frozen=True, slots=True)
class NeedsFull:
    """A report that is authentic and cannot be applied: answer 409 with these two."""

    reason: str
    """"unknown-base": its base is not here; "old": a report with a higher number was applied."""
    seq: int
    """The highest number applied for this node, 0 where there is none."""


class Feed:
    """The reports of one network."""

    def __init__(self, ca_public: bytes, max_skew: float = MAX_SKEW, max_nodes: int = MAX_NODES) -> None:
        """Take the authority's Ed25519 public key, the only root of trust."""
        self._ca = ca_public
        self._max_skew = max_skew
        self._max_nodes = max_nodes
        self.network = network_id(ca_public)
        self.blocklist: Blocklist | None = None
        """A verified list; set it when a newer one is known, and call `drop_revoked`."""
        self.nodes: dict[bytes, Reported] = {}
        """Node id to its state. For reading only."""

    def apply(self, encoded: bytes, now: float, unix: float) -> Applied | NeedsFull:
        """Verify and apply an untrusted report; `now` in seconds of any even clock, `unix` the time of day.

        Raises:
            WireError: malformed, absurd, of a clock that is off ("clock-skew"), or one node too many
                ("too-many-nodes").
            IdentityError: of another network, not signed, expired, revoked, or superseded by a newer
                certificate of the same name.
        """
        report = Report.decode(encoded)
        node = report.node_id
        held = self.nodes.get(node)
        report.verify(self._ca, unix, held.certificate.fingerprint if held is not None else b"")
        if self.blocklist is not None and self.blocklist.revokes(report.certificate):
            raise IdentityError("revoked", f"certificate of {report.name}")
        if held is not None and held.certificate.supersedes(report.certificate):
            raise IdentityError("superseded", f"{report.name} has a newer certificate")
        if abs(unix - report.issued) > self._max_skew:
            raise WireError("clock-skew", f"the clock of {report.name} is {report.issued - unix:+.0f} s off")
        if held is None:
            if not report.full:
                return NeedsFull("unknown-base", 0)
            if len(self.nodes) >= self._max_nodes:
                raise WireError("too-many-nodes", f"{self._max_nodes} are allowed")
            return self._replace(report, None, now)
        if report.seq == held.seq and report.epoch == held.epoch:
            return Applied(report, (), restarted=False, duplicate=True)
        if report.seq <= held.seq:
            return NeedsFull("old", held.seq)
        if report.full:
            return self._replace(report, held, now)
        if report.epoch != held.epoch or report.base > held.seq:
            return NeedsFull("unknown-base", held.seq)
        return self._lay_over(report, held, now)

    def _replace(self, report: Report, held: Reported | None, now: float) -> Applied:
        restarted = held is None or held.epoch != report.epoch
        before = {} if held is None else held.pairs
        named = {pair.peer for pair in report.pairs}
        gone = tuple(Pair(peer, PairState.FORGOTTEN) for peer in before if peer not in named)
        changed = tuple(pair for pair in report.pairs if pair != before.get(pair.peer))
        self.nodes[report.node_id] = Reported(
            report.certificate,
            report.epoch,
            report.seq,
            report.issued,
            report.interval,
            now,
            report.coordinates,
            {pair.peer: pair for pair in report.pairs},
            {pair.peer: now - pair.age for pair in report.pairs},
        )
        return Applied(report, changed + gone, restarted)

    def _lay_over(self, report: Report, held: Reported, now: float) -> Applied:
        changes: list[Pair] = []
        for pair in report.pairs:
            if pair.state is PairState.FORGOTTEN:
                if held.pairs.pop(pair.peer, None) is None:
                    continue
                del held.measured[pair.peer]
            else:
                held.pairs[pair.peer] = pair
                held.measured[pair.peer] = now - pair.age
            changes.append(pair)
        held.certificate = report.certificate
        held.seq = report.seq
        held.issued = report.issued
        held.interval = report.interval
        held.received = now
        held.coordinates = report.coordinates or held.coordinates
        return Applied(report, tuple(changes), restarted=False)

    def drop(self, node: bytes) -> None:
        """Forget a node; its next report has to be full."""
        self.nodes.pop(node, None)

    def drop_silent(self, now: float, after: float) -> list[bytes]:
        """Forget the nodes whose last report is older than `after` seconds, and return their ids."""
        return self._drop([node for node, held in self.nodes.items() if now - held.received > after])

    def drop_revoked(self) -> list[bytes]:
        """Forget the nodes that the blocklist revokes, and return their ids."""
        listed = self.blocklist
        if listed is None:
            return []
        return self._drop([node for node, held in self.nodes.items() if listed.revokes(held.certificate)])

    def _drop(self, nodes: list[bytes]) -> list[bytes]:
        for node in nodes:
            del self.nodes[node]
        return nodes
