"""The rendezvous without its sockets: what each datagram leads to, and when something is due."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from crossedge.rendezvous.checkpoint import Hint, Hints, decode_checkpoint, encode_checkpoint
from crossedge.rendezvous.door import Door, Transmit
from crossedge.rendezvous.notify import Notifier
from crossedge.rendezvous.registry import Node, Registry
from crossedge.rendezvous.relay import Relay, Run
from crossedge.rendezvous.requests import Requests
from crossedge.rendezvous.settings import RelayLimits, SourceLimits
from crossedge.rendezvous.stunserver import Local, StunServer
from crossedge.wire import messages as m
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.demux import Kind, classify
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey
from crossedge.wire.errors import WireError

RELAY_MAGIC = b"\xce\x02"
SWEEP_INTERVAL = 10.0
"""Seconds between looks for certificates and records that have ended."""


class Service:
    """A rendezvous: STUN, directory, calls, relay."""

    def __init__(
        self,
        key: ControlKey,
        networks: Sequence[bytes],
        locals_: Sequence[Local],
        random: Callable[[int], bytes],
        now: float,
        unix_offset: float,
        limits: SourceLimits | None = None,
        relay_limits: RelayLimits | None = None,
    ) -> None:
        """Start with nothing known.

        Args:
            key: the long-term control key.
            networks: CA public keys of the networks that are served.
            locals_: own addresses; see `stunserver.address_group`.
            random: returns that many random bytes.
            now: seconds of CLOCK_BOOTTIME.
            unix_offset: Unix time minus `now`.
            limits: what strangers and nodes may cost.
            relay_limits: what the relay may spend.
        """
        limits = limits or SourceLimits()
        self._started = now
        self.registry = Registry(tuple(networks), int.from_bytes(random(8)), limits.nodes, limits.lease)
        self.relay = Relay(relay_limits or RelayLimits(), random)
        self.stun = StunServer(limits, random)
        self.stun.locals.extend(locals_)
        self._notifier = Notifier(self.registry)
        self._hints = Hints()
        self._earlier: list[Hint] = []
        """Leases of an earlier life that may still come back."""
        self._lease_time = limits.lease
        self._door = Door(key, self.registry, limits, random, now)
        self._requests = Requests(self._door, self.registry, self.relay, self._notifier, limits, random, now)
        self._requests.unix_offset = unix_offset
        self._sweep_at = now + SWEEP_INTERVAL
        self.dropped: Counter[str] = Counter()

    # Input

    def add_local(self, local: Local) -> int:
        """Take a further own address in; return its number."""
        self.stun.locals.append(local)
        return len(self.stun.locals) - 1

    def set_clock(self, unix_offset: float) -> None:
        """Take the wall clock: Unix time is `now + unix_offset`."""
        self._requests.unix_offset = unix_offset

    def receive(self, datagram: bytes, source: UdpEndpoint, local: int, now: float) -> None:
        """Take one datagram that came from `source` to one of our locals."""
        if not source.port:
            self.dropped["bad-source"] += 1
            return
        kind = classify(datagram)
        if kind is Kind.STUN:
            answer = self.stun.answer(datagram, source, local, now)
            if answer is not None:
                self._door.transmit(answer.datagram, answer.destination, answer.local)
        elif kind is Kind.CONTROL:
            opened = self._door.open(datagram, source, local, now)
            if opened is not None:
                self._requests.handle(*opened, now)
        elif kind is Kind.RELAY:
            for run in self.relay.route(datagram, 0, source, now):
                self._door.transmit(datagram, run.destination, run.local)
        else:
            self.dropped["not-for-us" if kind else "unknown-kind"] += 1

    def receive_train(
        self, train: memoryview, segment: int, source: UdpEndpoint, local: int, now: float
    ) -> list[Run]:
        """Take a train of datagrams of `segment` bytes; return the parts of it that the relay sends on.

        What else is in it goes the way of `receive`.
        """
        runs: list[Run] = []
        total = len(train)
        step = segment or total or 1  # an empty datagram has no length to go by
        start = 0
        for at in range(0, total or 1, step):
            if train[at : at + 2] != RELAY_MAGIC:
                if start < at:
                    runs += self._route(train, start, at, segment, source, now)
                start = min(total, at + step)
                self.receive(bytes(train[at:start]), source, local, now)
        if start < total:
            runs += self._route(train, start, total, segment, source, now)
        return runs

    def _route(
        self, train: memoryview, start: int, end: int, segment: int, source: UdpEndpoint, now: float
    ) -> list[Run]:
        runs = self.relay.route(train[start:end], segment, source, now)
        if not start:
            return runs
        return [run._replace(start=run.start + start, end=run.end + start) for run in runs]

    def set_blocklist(self, encoded: bytes, now: float) -> Blocklist:
        """Take a newer signed blocklist in: nodes that it revokes lose lease, record and channels.

        Raises:
            WireError: malformed, of a network that is not served, badly signed, or not newer.
        """
        blocklist = Blocklist.decode(encoded)
        directory = self.registry.directories.get(blocklist.network)
        if directory is None:
            raise WireError("foreign-network", "blocklist of a network that is not served")
        blocklist.verify(directory.ca_public)
        blocklist.check_replaces(directory.blocklist)
        directory.blocklist = blocklist
        revoked = [
            node for node in directory.nodes.values() if node.serial < blocklist.revoked.get(node.name, 0)
        ]
        for node in revoked:
            self.registry.remove(node)
        self._gone(revoked, now)
        return blocklist

    def restore(self, checkpoint: bytes, now: float) -> int:
        """Tell the nodes in a checkpoint of an earlier life, paced, that the server restarted.

        Returns how many there are; `WireError` where the checkpoint is damaged.
        """
        hints = decode_checkpoint(checkpoint)
        self._earlier = hints
        self._hints.start(hints, now)
        return len(hints)

    # Output

    def poll_transmit(self) -> Transmit | None:
        """Return the next datagram to send, None where there is none."""
        return self._door.poll_transmit()

    def next_deadline(self) -> float:
        """Return when `handle_timeout` is due."""
        deadlines = (
            self._sweep_at,
            self.registry.next_deadline(),
            self.relay.next_deadline(),
            self._notifier.next_deadline(),
            self._hints.next_deadline(),
        )
        return min(deadline for deadline in deadlines if deadline is not None)

    def handle_timeout(self, now: float) -> None:
        """Do what is due: leases and channels that end, notifications, hints."""
        self.dropped["lease-expired"] += self.registry.expire(now)
        self.relay.handle_timeout(now)
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_INTERVAL
            self._gone(self.registry.sweep(self._unix(now)), now)
            if now - self._started > self._lease_time:
                self._earlier = []
        for lease in self._notifier.take(now):
            notify = m.Notify(epoch=self.registry.epoch, version=lease.node.directory.version)
            self._door.push(lease, notify)
        for hint in self._hints.take(now, self.registry.leases.__contains__):
            self._tell(hint)

    def checkpoint(self) -> bytes:
        """Return what `restore` takes in the next life; who has not come back yet is not forgotten."""
        leases = self.registry.leases
        here = [
            Hint(lease.endpoint, self.stun.locals[lease.local].bound, lease.control_key)
            for lease in leases.values()
        ]
        return encode_checkpoint(here + [hint for hint in self._earlier if hint.control_key not in leases])

    def status(self, now: float) -> dict[str, Any]:
        """Return counters and sizes, ready for JSON."""
        return {
            "uptime": round(now - self._started, 3),
            "epoch": f"{self.registry.epoch:016x}",
            "leases": len(self.registry.leases),
            "keepalive": self._requests.keepalive_interval(),
            "hints_waiting": len(self._hints),
            "networks": [
                {
                    "id": directory.id.hex(),
                    "nodes": len(directory.nodes),
                    "version": directory.version,
                    "tombstones": directory.tombstones,
                    "blocklist_serial": directory.blocklist.serial if directory.blocklist else None,
                    "blocklist_age": (
                        round(self._unix(now) - directory.blocklist.issued) if directory.blocklist else None
                    ),
                }
                for directory in self.registry.directories.values()
            ],
            "relay": {"channels": len(self.relay), **self.relay.forwarded},
            "stun_answered": self.stun.answered,
            "cookies": self._door.cookies,
            "key_agreements": self._door.agreements,
            "received": dict(self._requests.received),
            "refused": dict(self._requests.refused),
            "dropped": dict(self.drops()),
        }

    def drops(self) -> Counter[str]:
        """Return how many datagrams were dropped, by reason."""
        relay = Counter({f"relay-{reason}": count for reason, count in self.relay.dropped.items()})
        return self.dropped + self._door.dropped + self._requests.dropped + self.stun.dropped + relay

    def _tell(self, hint: Hint) -> None:
        # The same local as then, or else one of its family, with its port if there is one.
        alike = [
            (local.bound != hint.local, local.bound.port != hint.local.port, number)
            for number, local in enumerate(self.stun.locals)
            if (":" in local.bound.host) == (":" in hint.endpoint.host)
        ]
        if not alike:
            self.dropped["hint-without-local"] += 1
            return
        notify = m.Notify(epoch=self.registry.epoch, version=0)
        self._door.tell(hint.control_key, hint.endpoint, min(alike)[2], notify)

    def _gone(self, nodes: list[Node], now: float) -> None:
        for node in nodes:
            self.relay.forget_node(node.id)
        if nodes:
            self._notifier.changed(now)

    def _unix(self, now: float) -> float:
        return now + self._requests.unix_offset
