"""Who is in the network: records and certificates that this node verified itself.

A rendezvous is only a carrier. It can withhold what it knows; it cannot add a node, change a record, bring an
older one back or make us forget a peer. A peer leaves when its certificate holds no more, or when nobody
needs it, its record has run out and every rendezvous in use says that it is gone (one that restarted cannot:
then when the record has run out long ago).

A second certificate for a name replaces the first where its serial is higher. What two certificates cannot
both have (a session key, a prefix) belongs to the higher serial, which the authority signed later.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.wallclock import Wallclock
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.certificate import Certificate
from crossedge.wire.endpoint import Network
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.prefixes import overlap
from crossedge.wire.record import Record

MAX_PEERS: Final = 16_384
MAX_WANTED: Final = 256  # certificates and blocklists that are being asked for
ASK_AGAIN: Final = 10.0  # seconds until the same thing is asked for again
LINGER: Final = 7 * 86_400.0  # seconds after its end that a record is kept without anybody's word
SWEEP_INTERVAL: Final = 60.0  # seconds between looks for what has expired
PERSISTED: Final = b"persisted"  # the source of what an earlier life knew


@dataclass(frozen=True, slots=True)
class Peer:
    """A verified member: its newest record and the certificate that the record is signed under."""

    record: Record
    certificate: Certificate
    fingerprint: bytes
    """Of the certificate."""

    @property
    def node_id(self) -> bytes:
        """The 16-byte id."""
        return self.record.node_id

    @property
    def name(self) -> str:
        """The name in the certificate."""
        return self.certificate.name


@dataclass(frozen=True, slots=True)
class PeerAdded:
    """A member that was not known."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerChanged:
    """A newer record, perhaps under a newer certificate (then addresses and keys may be others)."""

    peer: Peer
    previous: Peer


@dataclass(frozen=True, slots=True)
class PeerRemoved:
    """Nothing may go to this member, nothing may come from it any more."""

    peer: Peer
    reason: str
    """ "gone", "expired", "revoked", "superseded"."""


@dataclass(frozen=True, slots=True)
class CertificateWanted:
    """A record came whose certificate is not known: ask for both by `Find`."""

    node_id: bytes


@dataclass(frozen=True, slots=True)
class BlocklistWanted:
    """A member advertises a newer blocklist than ours: ask a rendezvous, or that member."""

    serial: int
    node_id: bytes


@dataclass(frozen=True, slots=True)
class BlocklistChanged:
    """A newer blocklist holds from now on; it must be persisted."""

    blocklist: Blocklist


@dataclass(frozen=True, slots=True)
class OwnCertificateRevoked:
    """The blocklist names our own certificate."""

    serial: int


DirectoryEvent: TypeAlias = (
    PeerAdded
    | PeerChanged
    | PeerRemoved
    | CertificateWanted
    | BlocklistWanted
    | BlocklistChanged
    | OwnCertificateRevoked
)


class _Entry:
    """What is kept of a peer beside itself."""

    __slots__ = ("gone_at", "peer")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.gone_at: set[bytes] = set()
        """Sources that say it is no longer registered."""


class Directory:
    """Every member that is known. Core: bytes and the time in; events out.

    `is_needed(node_id)` may be set by who uses it: a peer with a session is not forgotten because a
    rendezvous does not list it.
    """

    def __init__(
        self,
        ca_public: bytes,
        own: Certificate,
        blocklist: Blocklist,
        clock: Wallclock,
        now: float,
        limit: int = MAX_PEERS,
    ) -> None:
        """Start empty; `own` and `blocklist` must be verified, `ca_public` is the root of all trust."""
        self.own = own
        self.blocklist = blocklist
        self.dropped: Counter[str] = Counter()
        self.is_needed: Callable[[bytes], bool] = lambda _: False
        self._ca = ca_public
        self._clock = clock
        self._limit = limit
        self._entries: dict[bytes, _Entry] = {}
        self._by_control_key: dict[bytes, bytes] = {}
        self._by_session_key: dict[bytes, bytes] = {}
        self._owners: dict[Network, bytes] = {}
        self._addresses: AllowedIPs[bytes] = AllowedIPs()
        self._servers: frozenset[bytes] = frozenset()
        self._wanted: dict[bytes, float] = {}
        self._events: deque[DirectoryEvent] = deque()  # a few for each input; the caller drains after each
        self._sweep_at = now + SWEEP_INTERVAL

    # --- Asking ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, node_id: bytes) -> bool:
        return node_id in self._entries

    def peers(self) -> list[Peer]:
        """Return all peers, oldest acquaintance first."""
        return [entry.peer for entry in self._entries.values()]

    def get(self, node_id: bytes) -> Peer | None:
        """Return the peer with this id."""
        entry = self._entries.get(node_id)
        return None if entry is None else entry.peer

    def by_control_key(self, key: bytes) -> Peer | None:
        """Return whose record names this control key."""
        return self.get(self._by_control_key.get(key, b""))

    def by_session_key(self, key: bytes) -> Peer | None:
        """Return whose certificate names this X25519 static key."""
        return self.get(self._by_session_key.get(key, b""))

    def by_address(self, address: bytes) -> Peer | None:
        """Return whose longest prefix has this packed address (4 or 16 bytes)."""
        return self.get(self._addresses.lookup(address) or b"")

    def by_name(self, name: str) -> Peer | None:
        """Return the peer of this name (a scan: for people)."""
        return next((e.peer for e in self._entries.values() if e.peer.name == name), None)

    def known(self) -> list[tuple[bytes, int]]:
        """Return (node id, sequence number) of every record, by node id: the digests of a pull."""
        return sorted((node, entry.peer.record.seq) for node, entry in self._entries.items())

    def is_listed(self, node_id: bytes) -> bool:
        """Tell whether some rendezvous in use has not said that this peer is gone."""
        entry = self._entries.get(node_id)
        return entry is not None and not (self._servers and self._servers <= entry.gone_at)

    def export(self) -> list[tuple[bytes, bytes]]:
        """Return (record, certificate) bytes of every peer, to persist."""
        return [(e.peer.record.encode(), e.peer.certificate.encode()) for e in self._entries.values()]

    def poll_event(self) -> DirectoryEvent | None:
        """Return the next thing that happened."""
        return self._events.popleft() if self._events else None

    # --- Taking records -------------------------------------------------------------------------------

    def offer(self, record: bytes, certificate: bytes, source: bytes, now: float) -> bool:
        """Take an untrusted record, and its certificate or b""; return whether it is news that holds.

        `source` names who brought it (the key id of a rendezvous, or `PERSISTED`). What is refused is counted
        in `dropped`. A record of ours that comes back is no news.
        """
        try:
            return self._offer(record, certificate, source, now)
        except WireError as error:
            self.dropped[error.reason] += 1
            return False

    def restore(self, items: Iterable[tuple[bytes, bytes]], now: float) -> int:
        """Take what an earlier life exported, expired records too: their endpoints may still hold.

        Returns how many were taken; the others are counted in `dropped`.
        """
        return sum(self.offer(record, certificate, PERSISTED, now) for record, certificate in items)

    def gone(self, node_ids: Iterable[bytes], source: bytes, now: float) -> None:
        """Note that a rendezvous no longer has these nodes; see the module for what that does not do."""
        for node in node_ids:
            entry = self._entries.get(node)
            if entry is not None:
                if source in self._servers:
                    entry.gone_at.add(source)
                self._review(entry, now)

    def set_servers(self, servers: Iterable[bytes]) -> None:
        """Take the key ids of the rendezvous that we are registered with, whose "gone" counts."""
        self._servers = frozenset(servers)
        for entry in self._entries.values():
            entry.gone_at &= self._servers

    def _offer(self, encoded: bytes, encoded_certificate: bytes, source: bytes, now: float) -> bool:
        record = Record.decode(encoded)
        if record.node_id == self.own.node_id:
            raise WireError("own-record")
        entry = self._entries.get(record.node_id)
        if entry is not None and entry.peer.fingerprint == record.certificate:
            if record.seq < entry.peer.record.seq:
                raise WireError("stale-record")
            if record.seq == entry.peer.record.seq:
                entry.gone_at.discard(source)
                return False
        # Under a newer certificate the numbers may start anew: the node was installed again.
        certificate = self._certificate(record, encoded_certificate, entry, now)
        if certificate is None:
            self._want(record.node_id, CertificateWanted(record.node_id), now)
            raise WireError("certificate-unknown")
        record.verify(certificate)
        if source != PERSISTED and not record.valid_at(self._clock.certain(now)):
            raise IdentityError("record-expired", certificate.name)
        peer = Peer(record, certificate, record.certificate)
        self._check_control_key(peer)
        if entry is None or entry.peer.fingerprint != peer.fingerprint:
            self._make_room(peer, entry, now)
        self._store(peer, entry, source)
        self._wanted.pop(peer.node_id, None)
        if record.blocklist > self.blocklist.serial:
            # One question at a time, so that a member that claims absurd serials gains nothing by it.
            self._want(b"blocklist", BlocklistWanted(record.blocklist, record.node_id), now)
        return True

    def _certificate(
        self, record: Record, encoded: bytes, entry: _Entry | None, now: float
    ) -> Certificate | None:
        """Return the verified certificate that a record names, None where it is not at hand."""
        if entry is not None and entry.peer.fingerprint == record.certificate:
            return entry.peer.certificate
        if not encoded:
            return None
        certificate = Certificate.decode(encoded)
        if certificate.fingerprint != record.certificate:
            raise IdentityError("other-certificate", certificate.name)
        if entry is not None and not certificate.supersedes(entry.peer.certificate):
            raise IdentityError("certificate-superseded", certificate.name)
        certificate.verify(self._ca)
        if self.blocklist.revokes(certificate):
            raise IdentityError("certificate-revoked", certificate.name)
        if not certificate.valid_at(self._clock.certain(now), self._clock.synchronised):
            raise IdentityError("certificate-expired", certificate.name)
        return certificate

    def _check_control_key(self, peer: Peer) -> None:
        """Refuse a record that names the control key of another member: it cannot have the private half."""
        holder = self._by_control_key.get(peer.record.control_key, peer.node_id)
        if holder != peer.node_id:
            raise IdentityError("control-key-taken", peer.name)

    def _make_room(self, peer: Peer, entry: _Entry | None, now: float) -> None:
        """Remove who has what a newer certificate was given; raise where the newcomer is the older one."""
        certificate = peer.certificate
        if certificate.x25519 == self.own.x25519:
            raise IdentityError("session-key-taken", peer.name)
        for prefix in certificate.allowed_ips:
            if any(overlap(prefix, ours) for ours in self.own.allowed_ips):
                raise IdentityError("prefix-taken", f"{peer.name}: {prefix} is our own")
        rivals = {self._by_session_key.get(certificate.x25519)}
        rivals |= {self._owners.get(prefix) for prefix in certificate.allowed_ips}
        losers = [self._entries[node] for node in rivals if node is not None and node != peer.node_id]
        for loser in losers:
            if loser.peer.certificate.serial > certificate.serial:
                raise IdentityError("prefix-taken", f"{peer.name}: {loser.peer.name} has a newer certificate")
        if entry is None and len(self._entries) - len(losers) >= self._limit:
            self._sweep(now)
            if len(self._entries) - len(losers) >= self._limit:
                raise WireError("directory-full")
        for loser in losers:
            if loser.peer.node_id in self._entries:  # the sweep may have been there
                self._remove(loser, "superseded")

    def _store(self, peer: Peer, entry: _Entry | None, source: bytes) -> None:
        if entry is None:
            self._entries[peer.node_id] = _Entry(peer)
            self._index(peer)
            self._events.append(PeerAdded(peer))
            return
        previous = entry.peer
        if previous.fingerprint == peer.fingerprint:
            if previous.record.control_key != peer.record.control_key:
                del self._by_control_key[previous.record.control_key]
                self._by_control_key[peer.record.control_key] = peer.node_id
        else:
            self._unindex(previous)
            self._index(peer)
        entry.peer = peer
        entry.gone_at.discard(source)
        self._events.append(PeerChanged(peer, previous))

    def _index(self, peer: Peer) -> None:
        self._by_control_key[peer.record.control_key] = peer.node_id
        self._by_session_key[peer.certificate.x25519] = peer.node_id
        for prefix in peer.certificate.allowed_ips:
            self._owners[prefix] = peer.node_id
            self._addresses.insert(prefix, peer.node_id)

    def _unindex(self, peer: Peer) -> None:
        self._by_control_key.pop(peer.record.control_key, None)
        self._by_session_key.pop(peer.certificate.x25519, None)
        for prefix in peer.certificate.allowed_ips:
            del self._owners[prefix]
            self._addresses.remove(prefix)

    def _remove(self, entry: _Entry, reason: str) -> None:
        del self._entries[entry.peer.node_id]
        self._unindex(entry.peer)
        self._events.append(PeerRemoved(entry.peer, reason))

    # --- Blocklist ------------------------------------------------------------------------------------

    def offer_blocklist(self, encoded: bytes, now: float) -> bool:
        """Take an untrusted blocklist; return whether it is newer and holds from now on."""
        try:
            blocklist = Blocklist.decode(encoded)
            blocklist.verify(self._ca)
            blocklist.check_replaces(self.blocklist)
        except WireError as error:
            self.dropped[error.reason] += 1
            return False
        self.blocklist = blocklist
        self._wanted.pop(b"blocklist", None)
        self._events.append(BlocklistChanged(blocklist))
        for entry in list(self._entries.values()):
            self._review(entry, now)
        if blocklist.revokes(self.own):
            self._events.append(OwnCertificateRevoked(blocklist.serial))
        return True

    def _want(self, key: bytes, event: CertificateWanted | BlocklistWanted, now: float) -> None:
        """Ask for something once, and again only after a while."""
        if self._wanted.get(key, now) > now:
            return
        if len(self._wanted) >= MAX_WANTED:
            self._wanted = {wanted: until for wanted, until in self._wanted.items() if until > now}
            if len(self._wanted) >= MAX_WANTED:
                self.dropped["too-much-wanted"] += 1
                return
        self._wanted[key] = now + ASK_AGAIN
        self._events.append(event)

    # --- Time -----------------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """Return when `handle_timeout` has something to do."""
        return self._sweep_at

    def handle_timeout(self, now: float) -> None:
        """Forget what has expired."""
        if now >= self._sweep_at:
            self._sweep(now)

    def _sweep(self, now: float) -> None:
        self._sweep_at = now + SWEEP_INTERVAL
        for entry in list(self._entries.values()):
            self._review(entry, now)

    def _review(self, entry: _Entry, now: float) -> None:
        """Remove a peer that may not or need not stay."""
        record, certificate = entry.peer.record, entry.peer.certificate
        certain = self._clock.certain(now)
        linger = 0.0 if self._servers <= entry.gone_at else LINGER
        if self.blocklist.revokes(certificate):
            self._remove(entry, "revoked")
        elif certificate.not_after + 1 <= certain:
            self._remove(entry, "expired")
        elif self._servers and not record.valid_at(certain - linger) and not self.is_needed(record.node_id):
            self._remove(entry, "gone")
