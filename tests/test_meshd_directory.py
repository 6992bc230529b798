"""The directory believes signatures, not rendezvous."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, ip_network
from typing import Any

import pytest

from crossedge.lab.chance import Chance
from crossedge.meshd.directory import (
    ASK_AGAIN,
    LINGER,
    SWEEP_INTERVAL,
    BlocklistChanged,
    BlocklistWanted,
    CertificateWanted,
    Directory,
    DirectoryEvent,
    OwnCertificateRevoked,
    PeerAdded,
    PeerChanged,
    PeerRemoved,
)
from crossedge.meshd.wallclock import Wallclock
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.certificate import Certificate
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.identity import SigningKey, key_id, network_id
from crossedge.wire.record import Candidate, CandidateKind, Record

TODAY = 1_760_000_000
YEAR = 365 * 86_400
HOUR = 3_600
CHANCE = Chance("directory")
CA = SigningKey.generate(CHANCE.token)
A, B = b"server-A", b"server-B"


class Member:
    """A node that signs its own records."""

    def __init__(self, number: int, ca: SigningKey = CA, serial: int | None = None) -> None:
        self.number = number
        self.signing = SigningKey.generate(CHANCE.token)
        self.session_key = CHANCE.token(32)
        self.control_key = CHANCE.token(32)
        self.certificate = self.certify(number if serial is None else serial, ca)

    def certify(self, serial: int, ca: SigningKey = CA, **changes: Any) -> Certificate:
        fields: dict[str, Any] = {
            "network": network_id(ca.public),
            "serial": serial,
            "name": f"node-{self.number}",
            "x25519": self.session_key,
            "ed25519": self.signing.public,
            "overlay4": IPv4Address(f"10.159.0.{self.number}"),
            "prefixes4": (ip_network(f"10.160.{self.number}.0/24"),),
            "prefixes6": (ip_network(f"fd00:0:0:{self.number:x}::/64"),),
            "not_before": TODAY - 86_400,
            "not_after": TODAY + YEAR,
            "issuer": key_id(ca.public),
            **changes,
        }
        return Certificate(**fields).sign(ca)

    def record(
        self,
        seq: int,
        signing: SigningKey | None = None,
        certificate: Certificate | None = None,
        **changes: Any,
    ) -> bytes:
        certificate = certificate or self.certificate
        fields: dict[str, Any] = {
            "node_id": certificate.node_id,
            "certificate": certificate.fingerprint,
            "control_key": self.control_key,
            "seq": seq,
            "issued": TODAY,
            "expires": TODAY + HOUR,
            "candidates": (Candidate(CandidateKind.HOST, UdpEndpoint("192.0.2.1", self.number)),),
            **changes,
        }
        return Record(**fields).sign(signing or self.signing).encode()

    @property
    def node_id(self) -> bytes:
        return self.certificate.node_id


OWN = Member(250)


def blocklist(serial: int, revoked: dict[str, int] | None = None, ca: SigningKey = CA) -> Blocklist:
    return Blocklist(network=network_id(ca.public), serial=serial, issued=TODAY, revoked=revoked or {}).sign(
        ca
    )


class World:
    """A directory, its clock and what came out of it."""

    def __init__(self, limit: int = 100, servers: Sequence[bytes] = (A, B)) -> None:
        self.now = 0.0
        self.clock = Wallclock(TODAY, 0.0)
        self.clock.set(TODAY, synchronised=True)
        self.directory = Directory(CA.public, OWN.certificate, blocklist(1), self.clock, 0.0, limit)
        self.directory.set_servers(servers)

    def offer(self, member: Member, seq: int = 1, source: bytes = A, certificate: bool = True) -> bool:
        encoded = member.certificate.encode() if certificate else b""
        return self.directory.offer(member.record(seq), encoded, source, self.now)

    def events(self) -> list[DirectoryEvent]:
        return list(iter(self.directory.poll_event, None))

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self.directory.next_deadline() <= end:
            self.now = self.directory.next_deadline()
            self.directory.handle_timeout(self.now)
        self.now = end


def test_verified_member_is_found_by_all_that_names_it() -> None:
    world, member = World(), Member(1)
    assert world.offer(member)
    [event] = world.events()
    assert isinstance(event, PeerAdded)
    directory, peer = world.directory, event.peer
    assert (peer.name, peer.node_id) == ("node-1", member.node_id)
    assert directory.get(member.node_id) is peer
    assert directory.by_name("node-1") is peer
    assert directory.by_control_key(member.control_key) is peer
    assert directory.by_session_key(member.session_key) is peer
    assert directory.by_address(bytes([10, 160, 1, 77])) is peer
    assert directory.by_address(bytes([10, 159, 0, 1])) is peer
    assert directory.by_address(bytes.fromhex("fd000000000000010000000000000009")) is peer
    assert directory.by_address(bytes([10, 160, 2, 77])) is None
    assert directory.known() == [(member.node_id, 1)]


def test_newer_record_needs_no_certificate_and_an_older_one_is_refused() -> None:
    world, member = World(), Member(1)
    world.offer(member, 5)
    assert world.offer(member, 7, certificate=False)
    assert not world.offer(member, 6)
    assert not world.offer(member, 7, source=B)
    added, changed = world.events()
    assert isinstance(changed, PeerChanged)
    assert isinstance(added, PeerAdded)
    assert (changed.peer.record.seq, changed.previous) == (7, added.peer)
    assert world.directory.dropped == {"stale-record": 1}


def test_a_new_control_key_takes_the_place_of_the_old() -> None:
    world, member = World(), Member(1)
    world.offer(member, 1)
    old, member.control_key = member.control_key, CHANCE.token(32)
    world.offer(member, 2)
    assert world.directory.by_control_key(old) is None
    assert world.directory.by_control_key(member.control_key) is not None


def forged_record(member: Member) -> tuple[bytes, bytes]:
    return member.record(9, SigningKey.generate(CHANCE.token)), member.certificate.encode()


def foreign_certificate(member: Member) -> tuple[bytes, bytes]:
    stranger = Member(member.number, ca=SigningKey.generate(CHANCE.token))
    return stranger.record(9), stranger.certificate.encode()


def forged_certificate(member: Member) -> tuple[bytes, bytes]:
    forged = Certificate.decode(member.certificate.encode()[:-1] + b"\0")
    return member.record(9, certificate=forged), forged.encode()


def certificate_of_another(member: Member) -> tuple[bytes, bytes]:
    return member.record(9), Member(2).certificate.encode()


def record_of_another(member: Member) -> tuple[bytes, bytes]:
    return member.record(9, node_id=Member(2).node_id), member.certificate.encode()


def expired_record(member: Member) -> tuple[bytes, bytes]:
    return member.record(9, issued=TODAY - 9, expires=TODAY - 1), member.certificate.encode()


def expired_certificate(member: Member) -> tuple[bytes, bytes]:
    ended = member.certify(50, not_after=TODAY - 1)
    return member.record(9, certificate=ended), ended.encode()


def early_certificate(member: Member) -> tuple[bytes, bytes]:
    early = member.certify(50, not_before=TODAY + HOUR)
    return member.record(9, certificate=early), early.encode()


def our_session_key(member: Member) -> tuple[bytes, bytes]:
    twin = member.certify(50, x25519=OWN.session_key)
    return member.record(9, certificate=twin), twin.encode()


def our_prefix(member: Member) -> tuple[bytes, bytes]:
    twin = member.certify(50, prefixes4=(ip_network("10.160.250.128/25"),))
    return member.record(9, certificate=twin), twin.encode()


def garbage(_: Member) -> tuple[bytes, bytes]:
    return b"\x81\xa1x" * 40, b""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (forged_record, "bad-signature"),
        (foreign_certificate, "other-network"),
        (forged_certificate, "bad-signature"),
        (certificate_of_another, "other-certificate"),
        (record_of_another, "other-node"),
        (expired_record, "record-expired"),
        (expired_certificate, "certificate-expired"),
        (early_certificate, "certificate-expired"),
        (our_session_key, "session-key-taken"),
        (our_prefix, "prefix-taken"),
        (garbage, "malformed"),
    ],
)
def test_what_does_not_hold_is_refused_and_counted(
    make: Callable[[Member], tuple[bytes, bytes]], reason: str
) -> None:
    world = World()
    record, certificate = make(Member(1))
    assert not world.directory.offer(record, certificate, A, 0.0)
    assert world.directory.dropped == {reason: 1}
    assert world.events() == []
    assert len(world.directory) == 0


def test_not_before_is_ignored_while_the_clock_is_not_synchronised() -> None:
    world, member = World(), Member(1)
    world.clock.set(0.0, synchronised=False)
    record, certificate = early_certificate(member)
    assert world.directory.offer(record, certificate, A, 0.0)


def test_our_own_record_is_no_peer() -> None:
    world = World()
    assert not world.offer(OWN)
    assert world.directory.dropped == {"own-record": 1}


def test_record_under_an_unknown_certificate_asks_for_it_once_in_a_while() -> None:
    world, member = World(), Member(1)
    assert not world.offer(member, certificate=False)
    assert not world.offer(member, 2, certificate=False)
    assert world.events() == [CertificateWanted(member.node_id)]
    world.now += ASK_AGAIN
    world.offer(member, 3, certificate=False)
    assert world.events() == [CertificateWanted(member.node_id)]


def test_newer_certificate_replaces_the_older_even_where_numbers_start_anew() -> None:
    world, member = World(), Member(1)
    world.offer(member, 1_000)
    first = member.certificate
    member.certificate = member.certify(99, prefixes4=(ip_network("10.160.77.0/24"),))
    assert world.offer(member, 5)
    assert world.directory.by_address(bytes([10, 160, 1, 1])) is None
    assert world.directory.by_address(bytes([10, 160, 77, 1])) is not None
    old = member.record(2_000, certificate=first)
    assert not world.directory.offer(old, first.encode(), A, 0.0)
    assert world.directory.dropped == {"certificate-superseded": 1}


def test_prefix_and_session_key_belong_to_the_newer_certificate() -> None:
    world, old, new = World(), Member(1, serial=10), Member(2, serial=11)
    new.certificate = new.certify(11, prefixes4=old.certificate.prefixes4, x25519=old.session_key)
    world.offer(old)
    assert world.offer(new)
    assert [type(event) for event in world.events()] == [PeerAdded, PeerRemoved, PeerAdded]
    assert world.directory.by_address(bytes([10, 160, 1, 1])) == world.directory.get(new.node_id)
    assert world.directory.by_session_key(old.session_key) == world.directory.get(new.node_id)
    assert not world.offer(old, 2)
    assert world.directory.dropped == {"prefix-taken": 1}


def test_nobody_can_claim_the_control_key_of_another() -> None:
    world, honest, thief = World(), Member(1), Member(2)
    world.offer(honest)
    thief.control_key = honest.control_key
    assert not world.offer(thief)
    assert world.directory.dropped == {"control-key-taken": 1}
    found = world.directory.by_control_key(honest.control_key)
    assert found is not None
    assert found.node_id == honest.node_id


def test_a_rendezvous_cannot_make_us_forget_a_peer() -> None:
    world, member = World(), Member(1)
    world.offer(member)
    world.directory.gone([member.node_id, b"unknown node id."], A, 0.0)
    world.directory.gone([member.node_id], B, 0.0)
    assert member.node_id in world.directory
    assert not world.directory.is_listed(member.node_id)
    world.offer(member, 1, source=B)
    assert world.directory.is_listed(member.node_id)


def test_peer_leaves_when_all_say_gone_and_its_record_has_run_out() -> None:
    world, member = World(), Member(1)
    world.offer(member)
    world.directory.gone([member.node_id], A, 0.0)
    world.sleep(HOUR + 2 * SWEEP_INTERVAL)
    assert member.node_id in world.directory
    world.directory.gone([member.node_id], b"stranger", world.now)
    assert member.node_id in world.directory
    world.directory.gone([member.node_id], B, world.now)
    assert isinstance(world.events()[-1], PeerRemoved)
    assert len(world.directory) == 0


def test_a_peer_that_is_needed_stays() -> None:
    world, member = World(servers=[A]), Member(1)
    world.offer(member)
    world.directory.is_needed = lambda node_id: node_id == member.node_id
    world.directory.gone([member.node_id], A, 0.0)
    world.sleep(10 * HOUR)
    assert member.node_id in world.directory
    world.directory.is_needed = lambda _: False
    world.sleep(2 * SWEEP_INTERVAL)
    assert member.node_id not in world.directory


def test_without_a_rendezvous_nobody_is_forgotten_before_the_certificate_ends() -> None:
    world, member = World(servers=[]), Member(1)
    world.offer(member)
    world.now = YEAR - 86_400.0
    world.directory.handle_timeout(world.now)
    assert member.node_id in world.directory
    world.now = YEAR + 1.0
    world.directory.handle_timeout(world.now)
    added, removed = world.events()
    assert isinstance(added, PeerAdded)
    assert removed == PeerRemoved(added.peer, "expired")


def test_a_record_that_nobody_renews_is_forgotten_at_last() -> None:
    world, member = World(), Member(1)
    world.offer(member)
    world.now = HOUR + LINGER - 60
    world.directory.handle_timeout(world.now)
    assert member.node_id in world.directory
    world.sleep(120 + SWEEP_INTERVAL)
    assert member.node_id not in world.directory


def test_revoked_peer_is_removed_and_does_not_come_back() -> None:
    world, member, other = World(), Member(1), Member(2)
    world.offer(member)
    world.offer(other)
    world.events()
    new = blocklist(2, {"node-1": 2})
    assert world.directory.offer_blocklist(new.encode(), 0.0)
    changed, removed = world.events()
    assert changed == BlocklistChanged(new)
    assert isinstance(removed, PeerRemoved)
    assert (removed.peer.name, removed.reason) == ("node-1", "revoked")
    assert not world.offer(member, 2)
    assert world.directory.dropped == {"certificate-revoked": 1}
    member.certificate = member.certify(2)
    assert world.offer(member, 3)
    assert len(world.directory) == 2


def test_blocklist_never_goes_back_and_never_comes_from_a_stranger() -> None:
    world = World()
    world.directory.offer_blocklist(blocklist(5).encode(), 0.0)
    assert not world.directory.offer_blocklist(blocklist(4).encode(), 0.0)
    stranger = SigningKey.generate(CHANCE.token)
    assert not world.directory.offer_blocklist(blocklist(9, ca=stranger).encode(), 0.0)
    assert not world.directory.offer_blocklist(b"nonsense", 0.0)
    assert world.directory.blocklist.serial == 5
    assert world.directory.dropped == {"blocklist-stale": 1, "other-network": 1, "truncated": 1}


def test_own_revocation_is_told() -> None:
    world = World()
    world.directory.offer_blocklist(blocklist(2, {"node-250": 251}).encode(), 0.0)
    assert OwnCertificateRevoked(2) in world.events()


def test_advertised_blocklist_is_asked_for_once_in_a_while() -> None:
    world, member = World(), Member(1)
    for seq in range(1, 5):
        world.directory.offer(member.record(seq, blocklist=7 + seq), member.certificate.encode(), A, 0.0)
    assert [e for e in world.events() if isinstance(e, BlocklistWanted)] == [
        BlocklistWanted(8, member.node_id)
    ]


def test_what_was_exported_comes_back_even_expired() -> None:
    world, members = World(), [Member(n) for n in range(1, 6)]
    for member in members:
        world.offer(member)
    exported = world.directory.export()
    again = World()
    again.now = 2.0 * HOUR
    assert again.directory.restore([*exported, (b"torn", b"")], again.now) == 5
    assert again.directory.known() == world.directory.known()
    assert again.directory.dropped == {"truncated": 1}


def test_directory_is_bounded() -> None:
    world = World(limit=3)
    for n in range(1, 5):
        world.offer(Member(n))
    assert len(world.directory) == 3
    assert world.directory.dropped == {"directory-full": 1}


def test_refused_newcomer_evicts_nobody() -> None:
    world = World(limit=1)
    world.offer(Member(1, serial=10))
    assert not world.offer(Member(2, serial=11))
    assert len(world.directory) == 1
