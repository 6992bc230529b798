"""What a node may ask, and what it is answered: one function per message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from crossedge.rendezvous.admission import examine
from crossedge.rendezvous.door import Asker, Door
from crossedge.rendezvous.limits import BucketTable
from crossedge.rendezvous.notify import Notifier
from crossedge.rendezvous.pages import digests, pull
from crossedge.rendezvous.registry import Lease, Node, Registry
from crossedge.rendezvous.relay import Relay, Side
from crossedge.rendezvous.settings import SourceLimits
from crossedge.wire import messages as m
from crossedge.wire.errors import WireError
from crossedge.wire.limits import MAX_PLAINTEXT

KEEPALIVE_MIN = 4.0
KEEPALIVE_MAX = 25.0
NODES_PER_KEEPALIVE_SECOND = 4000.0
CALLED_OVERHEAD = 96
"""Bytes of a `Called` besides the sealed message and the record."""

Handler = Callable[["Requests", Asker, Lease, Any, float], None]


class StaleSequence(Exception):  # noqa: N818  # it is an answer to give, not a fault of ours
    """A sequence number did not grow; the asker is shown its own newest record."""

    def __init__(self, node: Node) -> None:
        super().__init__("stale-sequence")
        self.node = node


class Requests:
    """Answers the messages that came in at the door."""

    def __init__(
        self,
        door: Door,
        registry: Registry,
        relay: Relay,
        notifier: Notifier,
        limits: SourceLimits,
        random: Callable[[int], bytes],
        now: float,
    ) -> None:
        self._door = door
        self._registry = registry
        self._relay = relay
        self._notifier = notifier
        self._limits = limits
        self._started = now
        self._page_rate = BucketTable(limits.slots, limits.page_rate, 2 * limits.page_rate, random)
        self._called_rate = BucketTable(limits.slots, limits.called_rate, 10 * limits.called_rate, random)
        self.unix_offset = 0.0
        """Unix time minus `now`, in seconds."""
        self.received: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def handle(self, asker: Asker, message: m.Message, now: float) -> None:
        """Do what a message asks for and answer it; a refusal has a name and is counted under it."""
        kind = type(message)
        if kind is not m.Register and kind not in HANDLERS:
            self.dropped["unexpected-message"] += 1
            return
        self.received[kind.__name__] += 1
        id_: int = getattr(message, "id", 0)
        try:
            if isinstance(message, m.Register):
                self._register(asker, message, now)
            elif asker.lease is None:
                raise WireError("unregistered")
            else:
                HANDLERS[kind](self, asker, asker.lease, message, now)
        except WireError as error:
            self.refused[error.reason] += 1
            self._door.answer(asker, m.Error(id=id_, code=error.reason, detail=error.detail[:120]), now)
        except StaleSequence as stale:
            self.refused["stale-sequence"] += 1
            self._door.answer(asker, m.Error(id=id_, code="stale-sequence", record=stale.node.record), now)

    def keepalive_interval(self) -> float:
        """Return the seconds between keepalives that nodes are asked for."""
        nodes = len(self._registry.leases)
        return min(max(nodes / NODES_PER_KEEPALIVE_SECOND, KEEPALIVE_MIN), KEEPALIVE_MAX)

    def _unix(self, now: float) -> float:
        return now + self.unix_offset

    def _register(self, asker: Asker, message: m.Register, now: float) -> None:
        sender = asker.sealed.sender
        directory, certificate, record = examine(
            message.certificate, message.record, sender, self._registry.directories, self._unix(now)
        )
        node = directory.nodes.get(record.node_id)
        if node is not None:
            # A node that lost its counter signs a record above the one it is shown here, under a new key.
            same_key = node.control_key == sender
            if (
                record.seq < node.seq
                or (record.seq == node.seq and message.record != node.record)
                or (same_key and message.seq <= node.last_seq)
            ):
                raise StaleSequence(node)
        before = directory.version
        node = directory.put(certificate, record)
        node.last_seq = message.seq
        lease = self._registry.lease(node, sender, asker.pair, asker.source, asker.local, now)
        self._door.forget(sender)
        lease.told = directory.version
        if directory.version != before:
            self._notifier.changed(now)
        registered = m.Registered(
            id=message.id,
            observed=asker.source,
            lease=self._limits.lease,
            keepalive=self.keepalive_interval(),
            epoch=self._registry.epoch,
            version=directory.version,
            unix_time=self._unix(now),
            restarted=now - self._started < self._limits.lease,
        )
        self._door.answer(asker, registered, now)

    def _keepalive(self, asker: Asker, lease: Lease, message: m.Keepalive, now: float) -> None:
        if message.seq <= lease.node.last_seq:
            raise StaleSequence(lease.node)
        lease.node.last_seq = message.seq
        self._registry.renew(lease, asker.source, asker.local, now)
        lease.told = lease.node.directory.version
        reply = m.KeepaliveReply(
            id=message.id,
            observed=asker.source,
            epoch=self._registry.epoch,
            version=lease.told,
            keepalive=self.keepalive_interval(),
        )
        self._door.answer(asker, reply, now)

    def _pull(self, asker: Asker, lease: Lease, message: m.Pull, now: float) -> None:
        directory = lease.node.directory
        if message.since and (
            message.epoch != self._registry.epoch or not directory.floor <= message.since <= directory.version
        ):
            raise WireError("digests-needed", "no history from that version to now")
        window = self._window(lease, message.window, now)
        if window:
            pages = pull(directory, message.id, self._registry.epoch, message.since, window)
            self._send_pages(asker, lease, pages, window, now)

    def _pull_digests(self, asker: Asker, lease: Lease, message: m.PullDigests, now: float) -> None:
        window = self._window(lease, message.window, now)
        if window:
            pages = digests(
                lease.node.directory,
                message.id,
                self._registry.epoch,
                message.first,
                message.last,
                message.known,
                window,
            )
            self._send_pages(asker, lease, pages, window, now)

    def _window(self, lease: Lease, wanted: int, now: float) -> int:
        window = int(self._page_rate.take_some(lease.node.key, now, 1, wanted))
        if not window:
            self.dropped["page-rate"] += 1
        return window

    def _send_pages(self, asker: Asker, lease: Lease, pages: list[m.Page], window: int, now: float) -> None:
        self._page_rate.refund(lease.node.key, window - len(pages))
        for page in pages:
            self._door.answer(asker, page, now)

    def _find(self, asker: Asker, lease: Lease, message: m.Find, now: float) -> None:
        directory = lease.node.directory
        node = directory.nodes.get(message.node) if message.node else directory.find(message.address)
        found = m.Found(id=message.id)
        if node is not None:
            found = m.Found(id=message.id, record=node.record, certificate=node.certificate)
        self._door.answer(asker, found, now)

    def _call(self, asker: Asker, lease: Lease, message: m.Call, now: float) -> None:
        if message.seq <= lease.call_seq:
            raise StaleSequence(lease.node)
        lease.call_seq = message.seq
        node = lease.node.directory.nodes.get(message.target)
        target = node.lease if node is not None else None
        if node is None or target is None or node is lease.node:
            self._door.answer(asker, m.CallReply(id=message.id, status="unknown"), now)
            return
        channel = None
        if self._called_rate.take(node.key, now):
            channel = self._relay.open(
                lease.node.directory.id,
                Side(lease.node.id, lease.endpoint, lease.local, lease.control_key),
                Side(node.id, target.endpoint, target.local, target.control_key),
                now,
            )
        if channel is None:
            self._door.answer(asker, m.CallReply(id=message.id, status="busy"), now)
            return
        fits = len(message.sealed) + len(lease.node.record) + CALLED_OVERHEAD <= MAX_PLAINTEXT
        called = m.Called(
            caller=lease.node.id,
            caller_seq=lease.node.seq,
            channel=channel.number,
            observed=lease.endpoint,
            sealed=message.sealed,
            record=lease.node.record if fits else b"",
        )
        self._door.push(target, called)
        self._door.answer(asker, m.CallReply(id=message.id, status="ok", channel=channel.number), now)

    def _bind(self, asker: Asker, lease: Lease, message: m.Bind, now: float) -> None:
        try:
            _, other = self._relay.bind(
                message.channel, lease.node.id, asker.source, asker.local, message.seq, now
            )
        except WireError as error:
            if error.reason == "stale-sequence":
                raise StaleSequence(lease.node) from None
            raise
        bound = m.Bound(
            id=message.id, channel=message.channel, observed=asker.source, peer_bound=other.seq > 0
        )
        self._door.answer(asker, bound, now)

    def _get_blocklist(self, asker: Asker, lease: Lease, message: m.GetBlocklist, now: float) -> None:
        blocklist = lease.node.directory.blocklist
        encoded = blocklist.encode() if blocklist is not None else b""
        serial = blocklist.serial if blocklist is not None else 0
        # A part of another serial would not fit what the asker has: it begins anew.
        offset = message.offset if message.serial in (0, serial) else 0
        part = m.BlocklistPart(
            id=message.id,
            serial=serial,
            total=len(encoded),
            offset=offset,
            data=encoded[offset : offset + m.MAX_PART],
        )
        self._door.answer(asker, part, now)


HANDLERS: dict[type[m.Message], Handler] = {
    m.Keepalive: Requests._keepalive,
    m.Pull: Requests._pull,
    m.PullDigests: Requests._pull_digests,
    m.Find: Requests._find,
    m.Call: Requests._call,
    m.Bind: Requests._bind,
    m.GetBlocklist: Requests._get_blocklist,
}
"""What a node with a lease may ask."""
