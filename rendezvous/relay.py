"""The relay: channels between two nodes of one network that have no direct path yet.

A channel is two sides, each a UDP endpoint of a node. The rendezvous set them from what sealed messages
proved; afterwards only a sealed `Bind` with a greater sequence number moves a side. A datagram is forwarded
unread and unchanged (`wire/relay.py` draws its header) when its source is one side of the channel that its
header names; it leaves towards the other side. Nothing is answered to strangers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from crossedge.rendezvous.deadlines import Deadlines
from crossedge.rendezvous.limits import Bucket
from crossedge.rendezvous.settings import RelayLimits
from crossedge.wire.demux import Buffer
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import WireError
from crossedge.wire.relay import HEADER, unpack_header

BURST_TIME = 0.25
"""Seconds of its rate that a node or a network may send at once (or one full train, if that is more)."""

FULL_TRAIN = 65_536.0
"""Bytes of the largest train."""


@dataclass(slots=True)
class Side:
    """One end of a channel."""

    node: bytes
    endpoint: UdpEndpoint
    local: int
    """Our socket that the node's NAT knows, the one to send from."""
    control_key: bytes = b""
    """The node's control key at that time: another one means that the node restarted."""
    seq: int = 0
    """Sequence number of the `Bind` that set the endpoint; 0 until there was one."""
    datagrams: int = 0
    """Datagrams that came from this side and were forwarded."""


@dataclass(slots=True)
class Channel:
    """A pair of sides."""

    number: int
    network: bytes
    sides: tuple[Side, Side]
    used: float

    def side_of(self, node: bytes) -> tuple[Side, Side] | None:
        """Return (that node's side, the other side), or None if the node is not in it."""
        first, second = self.sides
        if first.node == node:
            return first, second
        return (second, first) if second.node == node else None


class Run(NamedTuple):
    """Consecutive segments of a received train, `train[start:end]`, that leave as one train."""

    start: int
    end: int
    destination: UdpEndpoint
    local: int


class Relay:
    """All channels of a rendezvous. Core: no sockets; the caller sends the runs that `route` returns."""

    def __init__(self, limits: RelayLimits, random: Callable[[int], bytes]) -> None:
        self._limits = limits
        self._random = random
        self._channels: dict[int, Channel] = {}
        self._pairs: dict[tuple[bytes, bytes], int] = {}
        self._of_node: dict[bytes, set[int]] = {}
        self._node_quota: dict[bytes, Bucket] = {}
        self._network_quota: dict[bytes, Bucket] = {}
        self._deadlines: Deadlines[int] = Deadlines()
        self.dropped: Counter[str] = Counter()
        self.forwarded: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._channels)

    def get(self, number: int) -> Channel | None:
        """Return the channel of that number."""
        return self._channels.get(number)

    def open(self, network: bytes, caller: Side, callee: Side, now: float) -> Channel | None:
        """Return the channel of an unordered pair, made if there is none; None where a bound is reached.

        A side that a `Bind` set is moved by `Bind` alone, as long as the node lives; one that never was
        bound, or by a node that has restarted since, follows the lease.
        """
        pair = _pair(caller.node, callee.node)
        number = self._pairs.get(pair)
        if number is not None:
            channel = self._channels[number]
            channel.used = now
            for fresh in (caller, callee):
                sides = channel.side_of(fresh.node)
                if sides is not None and (not sides[0].seq or sides[0].control_key != fresh.control_key):
                    mine = sides[0]
                    mine.endpoint, mine.local, mine.control_key = (
                        fresh.endpoint,
                        fresh.local,
                        fresh.control_key,
                    )
                    mine.seq = 0
            return channel
        if len(self._channels) >= self._limits.channels:
            self.dropped["channel-table-full"] += 1
            return None
        for side in (caller, callee):
            if len(self._of_node.get(side.node, ())) >= self._limits.channels_per_node:
                self.dropped["node-channels-full"] += 1
                return None
        while not number or number in self._channels:
            number = int.from_bytes(self._random(6))
        channel = Channel(number, network, (caller, callee), now)
        self._channels[number] = channel
        self._pairs[pair] = number
        for side in (caller, callee):
            self._of_node.setdefault(side.node, set()).add(number)
            if side.node not in self._node_quota:
                self._node_quota[side.node] = self._bucket(self._limits.node_rate, now)
        if network not in self._network_quota:
            self._network_quota[network] = self._bucket(self._limits.network_rate, now)
        self._deadlines.add(number, now + self._limits.idle)
        return channel

    def bind(
        self, number: int, node: bytes, endpoint: UdpEndpoint, local: int, seq: int, now: float
    ) -> tuple[Side, Side]:
        """Move a node's side of a channel to where its sealed `Bind` came from; return (its side, the other).

        Raises:
            WireError: "unknown-channel" (there is none, or the node is not in it), "stale-sequence".
        """
        channel = self._channels.get(number)
        sides = channel.side_of(node) if channel else None
        if channel is None or sides is None:
            raise WireError("unknown-channel")
        mine, other = sides
        if seq <= mine.seq:
            raise WireError("stale-sequence")
        mine.seq = seq
        mine.endpoint = endpoint
        mine.local = local
        channel.used = now
        return mine, other

    def route(self, train: Buffer, segment: int, source: UdpEndpoint, now: float) -> list[Run]:
        """Return what of a received train is to be sent where.

        Args:
            train: one datagram or, where `segment` is not 0, several of `segment` bytes (the last may be
                shorter). Each segment's header is checked; neighbours of one channel stay one train.
            segment: bytes per datagram, 0 for a single one.
            source: where it came from.
            now: seconds.
        """
        runs: list[Run] = []
        total = len(train)
        step = segment or total
        start = 0
        while start < total:
            head = bytes(train[start : start + HEADER])
            end = start + step
            while end < total and bytes(train[end : end + HEADER]) == head:
                end += step
            end = min(end, total)
            run = self._forward(train, start, end, step, source, now)
            if run is not None:
                runs.append(run)
            start = end
        return runs

    def _forward(
        self, train: Buffer, start: int, end: int, step: int, source: UdpEndpoint, now: float
    ) -> Run | None:
        size = end - start
        count = -(-size // step)
        try:
            channel = self._channels.get(unpack_header(train[start:end]))
        except WireError as error:
            self._drop(error.reason, count)
            return None
        if channel is None:
            self._drop("unknown-channel", count)
            return None
        first, second = channel.sides
        if first.endpoint == source:
            side, other = first, second
        elif second.endpoint == source:
            side, other = second, first
        else:
            self._drop("not-a-side", count)
            return None
        quota = self._network_quota[channel.network]
        if not quota.has(now, size):
            self._drop("network-quota", count)
            return None
        if not self._node_quota[side.node].take(now, size):
            self._drop("node-quota", count)
            return None
        quota.take(now, size)
        channel.used = now
        side.datagrams += count
        self.forwarded["datagrams"] += count
        self.forwarded["bytes"] += size
        self.forwarded["trains"] += 1
        return Run(start, end, other.endpoint, other.local)

    def forget_node(self, node: bytes) -> None:
        """Close every channel that a node is a side of: its certificate no longer holds."""
        for number in tuple(self._of_node.get(node, ())):
            self._close(number)

    def handle_timeout(self, now: float) -> None:
        """Forget idle channels."""
        for number in self._deadlines.due(now, self._expiry):
            self._close(number, watched=False)

    def next_deadline(self) -> float | None:
        """Return when `handle_timeout` may have something to do."""
        return self._deadlines.next()

    def _expiry(self, number: int) -> float:
        return self._channels[number].used + self._limits.idle

    def _close(self, number: int, watched: bool = True) -> None:
        channel = self._channels.pop(number)
        first, second = channel.sides
        del self._pairs[_pair(first.node, second.node)]
        for node in {first.node, second.node}:
            numbers = self._of_node[node]
            numbers.discard(number)
            if not numbers:
                del self._of_node[node]
                # A node that closes its last channel to win a fresh burst would have to idle for minutes.
                del self._node_quota[node]
        if watched:
            self._deadlines.discard(number)

    def _bucket(self, rate: float, now: float) -> Bucket:
        return Bucket(rate, max(FULL_TRAIN, rate * BURST_TIME), now)

    def _drop(self, reason: str, count: int) -> None:
        self.dropped[reason] += count


def _pair(first: bytes, second: bytes) -> tuple[bytes, bytes]:
    return (first, second) if first < second else (second, first)
