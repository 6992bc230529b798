"""The registry: whose record is newest, who holds a lease, and what changed since when.

Each network has a directory. Its version is (epoch, n): the epoch is random at each start of the server, n
grows with each change. A log in the order of n serves whoever was here before; digests over ranges of node
ids serve whoever comes from another epoch. What is removed leaves a tombstone, and tombstones are bounded:
who is further behind than the oldest of them is sent to the digests.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass

from crossedge.rendezvous.deadlines import Deadlines
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.certificate import Certificate
from crossedge.wire.endpoint import Network, UdpEndpoint
from crossedge.wire.envelope import PairKeys
from crossedge.wire.errors import WireError
from crossedge.wire.identity import network_id
from crossedge.wire.record import Record

TOMBSTONES = 4096
"""Removed nodes that a directory remembers."""

Route = tuple[int, int, int]
"""Bytes of the address, prefix length, network bits."""


@dataclass(slots=True)
class Lease:
    """A node that is here now, at an endpoint that it proved."""

    node: Node
    control_key: bytes
    pair: PairKeys
    endpoint: UdpEndpoint
    local: int
    """Our socket that the node speaks to."""
    expires: float
    told: int = 0
    """The directory version that the node was last told."""
    call_seq: int = 0
    """Sequence number of its last `Call`."""


@dataclass(slots=True)
class Node:
    """The newest verified statements of one node."""

    id: bytes
    directory: Directory
    record: bytes
    seq: int
    """Of the record."""
    expires: int
    """Unix time at which the record ends."""
    control_key: bytes
    certificate: bytes
    name: str
    serial: int
    fingerprint: bytes
    not_after: int
    """Unix time at which the certificate ends."""
    routes: tuple[Route, ...]
    certificate_since: int = 0
    """Version that brought this certificate."""
    version: int = 0
    """Version that brought this record."""
    last_seq: int = 0
    """Sequence number of the last `Register` or `Keepalive` under this control key."""
    lease: Lease | None = None

    @property
    def key(self) -> int:
        """The node's key in tables of token buckets."""
        return int.from_bytes(self.id[:8])


class Directory:
    """All nodes of one network."""

    def __init__(self, ca_public: bytes, limit: int) -> None:
        self.ca_public = ca_public
        self.id = network_id(ca_public)
        self.blocklist: Blocklist | None = None
        self.nodes: dict[bytes, Node] = {}
        self.version = 0
        self.floor = 0
        """Changes up to this version may be missing from the log: their tombstones were dropped."""
        self._limit = limit
        self._order: list[bytes] = []
        self._log: list[int] = []
        self._log_ids: list[bytes] = []
        self._tombstones: dict[bytes, int] = {}
        self._routes: dict[Route, bytes] = {}
        self._lengths: dict[tuple[int, int], int] = {}

    @property
    def tombstones(self) -> int:
        """How many removed nodes are remembered."""
        return len(self._tombstones)

    def put(self, certificate: Certificate, record: Record) -> Node:
        """Take verified statements of a node in; the version grows if anything in them is new.

        Raises:
            WireError: "superseded" (a certificate with a higher serial is known), "directory-full".
        """
        node = self.nodes.get(record.node_id)
        if node is None:
            if len(self.nodes) >= self._limit:
                raise WireError("directory-full")
            node = _node(self, certificate, record)
            self.nodes[node.id] = node
            insort(self._order, node.id)
            node.certificate_since = self._change(node)
            self._add_routes(node)
            return node
        encoded = certificate.encode()
        renewed = encoded != node.certificate
        if renewed and certificate.serial <= node.serial:
            raise WireError("superseded")
        if record.encode() == node.record and not renewed:
            return node
        fresh = _node(self, certificate, record)
        self._remove_routes(node)
        for name in (
            "record",
            "seq",
            "expires",
            "certificate",
            "serial",
            "fingerprint",
            "not_after",
            "routes",
        ):
            setattr(node, name, getattr(fresh, name))
        self._add_routes(node)
        self._change(node)
        if renewed:
            node.certificate_since = node.version
        return node

    def remove(self, node: Node) -> None:
        """Take a node out; a tombstone tells those who knew it."""
        del self.nodes[node.id]
        del self._order[bisect_left(self._order, node.id)]
        self._remove_routes(node)
        self._tombstones.pop(node.id, None)
        self._change(node)
        self._tombstones[node.id] = self.version
        while len(self._tombstones) > TOMBSTONES:
            oldest = next(iter(self._tombstones))
            self.floor = self._tombstones.pop(oldest)

    def find(self, address: bytes) -> Node | None:
        """Return the node whose certificate has the longest prefix around an address (4 or 16 bytes)."""
        size, bits = len(address), int.from_bytes(address)
        for length in sorted((length for kind, length in self._lengths if kind == size), reverse=True):
            node = self._routes.get((size, length, bits >> (size * 8 - length)))
            if node is not None:
                return self.nodes[node]
        return None

    def changes(self, since: int) -> Iterator[tuple[int, bytes, Node | None]]:
        """Yield (version, node id, node or None if it is gone) of all that changed, oldest first."""
        for at in range(bisect_right(self._log, since), len(self._log)):
            version, node_id = self._log[at], self._log_ids[at]
            node = self.nodes.get(node_id)
            if node is not None and node.version == version:
                yield version, node_id, node
            elif self._tombstones.get(node_id) == version:
                yield version, node_id, None

    def between(self, first: bytes, last: bytes) -> Iterator[Node]:
        """Yield the nodes with ids from `first` to `last`, both included, in order."""
        for at in range(bisect_left(self._order, first), bisect_right(self._order, last)):
            yield self.nodes[self._order[at]]

    def is_gone(self, node_id: bytes) -> bool:
        """Tell whether a node was here and was removed, as far as is remembered."""
        return node_id in self._tombstones

    def _change(self, node: Node) -> int:
        self.version += 1
        node.version = self.version
        self._tombstones.pop(node.id, None)
        if len(self._log) > 2 * (len(self.nodes) + len(self._tombstones)) + 256:
            live = [(version, node_id) for version, node_id, _ in self.changes(0)]
            self._log = [version for version, _ in live]
            self._log_ids = [node_id for _, node_id in live]
        self._log.append(self.version)
        self._log_ids.append(node.id)
        return self.version

    def _add_routes(self, node: Node) -> None:
        for route in node.routes:
            # The authority gives no prefix to two nodes at once; the holder of the newer certificate has it.
            holder = self.nodes.get(self._routes.get(route, b""))
            if holder is None or holder.serial <= node.serial:
                if route not in self._routes:
                    kind = route[:2]
                    self._lengths[kind] = self._lengths.get(kind, 0) + 1
                self._routes[route] = node.id

    def _remove_routes(self, node: Node) -> None:
        for route in node.routes:
            if self._routes.get(route) == node.id:
                del self._routes[route]
                kind = route[:2]
                self._lengths[kind] -= 1
                if not self._lengths[kind]:
                    del self._lengths[kind]


def _node(directory: Directory, certificate: Certificate, record: Record) -> Node:
    return Node(
        id=record.node_id,
        directory=directory,
        record=record.encode(),
        seq=record.seq,
        expires=record.expires,
        control_key=record.control_key,
        certificate=certificate.encode(),
        name=certificate.name,
        serial=certificate.serial,
        fingerprint=certificate.fingerprint,
        not_after=certificate.not_after,
        routes=tuple(_route(prefix) for prefix in certificate.allowed_ips),
    )


def _route(prefix: Network) -> Route:
    packed = prefix.network_address.packed
    return len(packed), prefix.prefixlen, int.from_bytes(packed) >> (len(packed) * 8 - prefix.prefixlen)


class Registry:
    """All directories, and the leases by control key."""

    def __init__(self, networks: tuple[bytes, ...], epoch: int, limit: int, lease: float) -> None:
        self.epoch = epoch
        self.directories = {
            directory.id: directory for directory in (Directory(ca, limit) for ca in networks)
        }
        self.leases: dict[bytes, Lease] = {}
        self._lease_time = lease
        self.moves = 0
        """Grows whenever a lease comes, moves or ends."""
        self._deadlines: Deadlines[bytes] = Deadlines()

    def __len__(self) -> int:
        return len(self.leases)

    def lease(
        self, node: Node, control_key: bytes, pair: PairKeys, endpoint: UdpEndpoint, local: int, now: float
    ) -> Lease:
        """Give a node a lease, or renew the one it has; one of an older control key ends."""
        lease = node.lease
        if lease is not None and lease.control_key != control_key:
            self.end(lease)
            lease = None
        if lease is None:
            holder = self.leases.get(control_key)
            if holder is not None:  # Two names of one owner under one key: the later has it.
                self.end(holder)
            lease = Lease(node, control_key, pair, endpoint, local, now + self._lease_time)
            node.lease = lease
            node.control_key = control_key
            self.leases[control_key] = lease
            self._deadlines.add(control_key, lease.expires)
            self.moves += 1
        self.renew(lease, endpoint, local, now)
        return lease

    def renew(self, lease: Lease, endpoint: UdpEndpoint, local: int, now: float) -> None:
        """Put the end of a lease off; its endpoint is where the node was just proven to be."""
        if lease.endpoint != endpoint or lease.local != local:
            lease.endpoint, lease.local = endpoint, local
            self.moves += 1
        lease.expires = now + self._lease_time

    def end(self, lease: Lease) -> None:
        """End a lease; the node's record stays."""
        del self.leases[lease.control_key]
        self._deadlines.discard(lease.control_key)
        lease.node.lease = None
        self.moves += 1

    def expire(self, now: float) -> int:
        """End the leases whose time has passed; return how many."""
        count = 0
        for control_key in self._deadlines.due(now, lambda key: self.leases[key].expires):
            self.leases.pop(control_key).node.lease = None
            count += 1
        self.moves += count
        return count

    def next_deadline(self) -> float | None:
        """Return when a lease may end."""
        return self._deadlines.next()

    def remove(self, node: Node) -> None:
        """Take a node and its lease out."""
        if node.lease is not None:
            self.end(node.lease)
        node.directory.remove(node)

    def sweep(self, unix: float) -> list[Node]:
        """Take out, and return, the nodes whose certificate or (without a lease) record has ended.

        A record whose node is here may have ended by our clock alone; its owner is told the time and signs
        a fresh one.
        """
        ended = [
            node
            for directory in self.directories.values()
            for node in directory.nodes.values()
            if unix > node.not_after or (unix > node.expires and node.lease is None)
        ]
        for node in ended:
            self.remove(node)
        return ended
