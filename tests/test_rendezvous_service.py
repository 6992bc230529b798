"""Each message of the contract, and its rules, against a virtual clock."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from crossedge.rendezvous.settings import SourceLimits
from crossedge.wire import messages as m
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.identity import SigningKey
from crossedge.wire.record import Record
from crossedge.wire.relay import pack_header
from tests.rendezvous_client import ALICE, BOB, ELSEWHERE, NOW, UNIX, Node, World, code, couple, only


@pytest.fixture
def world() -> World:
    return World()


# Register


def test_register_gets_lease_observed_endpoint_version_and_time(world: World) -> None:
    node = Node(world, "alice", ALICE)
    answer = node.register(source=UdpEndpoint("203.0.113.77", 4242))
    assert answer.observed == UdpEndpoint("203.0.113.77", 4242)
    assert (answer.lease, answer.keepalive, answer.version) == (90, 4.0, 1)
    assert answer.epoch == world.service.registry.epoch
    assert answer.unix_time == UNIX + NOW
    assert answer.restarted
    world.advance(91)
    assert not node.register().restarted


def test_stranger_gets_a_cookie_before_anything_else(world: World) -> None:
    node = Node(world, "alice", ALICE)
    (reply,) = world.send(node.seal(node.registration()), ALICE)
    assert len(reply) == 76
    assert node.take(reply) is None
    assert world.service.registry.leases == {}
    assert only(node.ask(node.registration()), m.Registered)


def test_cookie_of_another_address_does_not_count(world: World) -> None:
    node = Node(world, "alice", ALICE)
    node.ask(node.registration(), retry=False)
    assert node.ask(node.registration(), source=ELSEWHERE, retry=False) == []
    assert world.service.registry.leases == {}


def test_keepalive_interval_grows_with_the_mesh(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossedge.rendezvous.requests.NODES_PER_KEEPALIVE_SECOND", 0.2)
    assert Node(world, "a", ALICE).register().keepalive == 5.0
    assert Node(world, "b", BOB).register().keepalive == 10.0
    for number in range(4):
        last = Node(world, f"n{number}", UdpEndpoint("198.51.100.9", 5000 + number)).register()
    assert last.keepalive == 25.0


def test_unregistered_sender_is_told_so(world: World) -> None:
    node = Node(world, "alice", ALICE)
    assert code(node.keepalive()) == "unregistered"
    assert code(node.ask(m.Find(id=1, address=bytes(4)))) == "unregistered"
    assert code(node.bind(5)) == "unregistered"


def test_stale_sequence_is_answered_with_the_newest_record(world: World) -> None:
    node = Node(world, "alice", ALICE)
    old = node.record
    node.record = node.sign()
    node.register()
    newest = node.record
    node.record = old
    error = only(node.ask(node.registration()), m.Error)
    assert error.code == "stale-sequence"
    assert error.record == newest.encode()
    repeated = m.Keepalive(id=9, seq=node.seq - 100, epoch=0, version=0)
    error = only(node.ask(repeated), m.Error)
    assert (error.code, error.record) == ("stale-sequence", newest.encode())


def test_node_that_lost_its_counter_comes_back_with_the_record_it_is_shown(world: World) -> None:
    node = Node(world, "alice", ALICE)
    node.register()
    for _ in range(5):
        node.keepalive()
    # Reinstalled: a fresh control key, and a clock in 1970.
    node.new_key()
    node.seq = 1000
    node.record = node.sign()
    error = only(node.ask(node.registration()), m.Error)
    assert error.code == "stale-sequence"
    shown = Record.decode(error.record)
    shown.verify(node.certificate)
    node.seq = shown.seq
    node.record = node.sign()
    assert node.register()
    assert isinstance(node.keepalive()[0], m.KeepaliveReply)
    assert len(world.service.registry.leases) == 1


def test_record_that_ended_by_our_clock_still_gets_a_lease_and_the_time(world: World) -> None:
    node = Node(world, "alice", ALICE)
    certificate = node.certificate.fingerprint
    node.record = Record(
        node_id=node.id,
        certificate=certificate,
        control_key=node.control.public,
        seq=node.next_seq(),
        issued=1000,
        expires=2000,
    ).sign(node.signing)
    assert node.register().unix_time == UNIX + NOW


def test_new_control_key_of_a_node_ends_the_lease_of_the_old(world: World) -> None:
    node = Node(world, "alice", ALICE)
    node.register()
    old = node.control.public
    node.new_key()
    node.record = node.sign()
    node.register()
    assert old not in world.service.registry.leases
    assert len(world.service.registry.leases) == 1


@pytest.mark.parametrize("serial", [5, 6])
def test_certificate_that_is_not_newer_than_the_known_one_is_superseded(world: World, serial: int) -> None:
    node = Node(world, "alice", ALICE)
    node.certificate = world.certificate("alice", node.signing, serial=6)
    node.record = node.sign()
    node.register()
    node.certificate = world.certificate("alice", node.signing, serial=serial)
    node.record = node.sign()
    assert code(node.ask(node.registration())) == "superseded"


def test_refusals_have_names(world: World) -> None:
    def refused(node: Node) -> str:
        return code(node.ask(node.registration()))

    def node(number: int) -> Node:
        return Node(world, f"n{number}", UdpEndpoint("198.51.100.7", 2000 + number))

    other = SigningKey.generate(world.random.randbytes)

    foreign = node(1)
    foreign.certificate = world.certificate("n1", foreign.signing, ca=other)
    foreign.record = foreign.sign()
    assert refused(foreign) == "foreign-network"

    forged = node(2)
    body, signature = forged.certificate.encode()[:-64], forged.certificate.encode()[-64:]
    forged.certificate = type(forged.certificate).decode(body + signature[::-1])
    forged.record = forged.sign()
    assert refused(forged) == "bad-signature"

    expired = node(3)
    expired.certificate = world.certificate("n3", expired.signing, not_before=UNIX - 10, not_after=UNIX)
    expired.record = expired.sign()
    assert refused(expired) == "expired"

    early = node(4)
    early.certificate = world.certificate("n4", early.signing, not_before=UNIX + 10**6)
    early.record = early.sign()
    assert refused(early) == "not-yet-valid"

    world.service.set_blocklist(world.blocklist(1, {"n5": 1000}), world.now)
    assert refused(node(5)) == "revoked"

    wrong_signer = node(6)
    wrong_signer.signing = other
    wrong_signer.record = wrong_signer.sign()
    assert refused(wrong_signer) == "bad-signature"

    thief = node(7)
    victim = node(8)
    thief.certificate, thief.record = victim.certificate, victim.record
    assert refused(thief) == "other-control-key"

    mixed = node(9)
    mixed.record = mixed.sign(certificate=node(10).certificate)
    assert refused(mixed) == "other-certificate"

    assert world.service.registry.leases == {}
    assert sum(world.service.status(world.now)["refused"].values()) == 8


# Leases


def test_keepalive_tells_the_observed_endpoint_and_version(world: World) -> None:
    alice, _ = couple(world)
    answer = only(alice.keepalive(), m.KeepaliveReply)
    assert (answer.observed, answer.version) == (ALICE, 2)


def test_lease_ends_without_keepalive_and_calls_then_find_nobody(world: World) -> None:
    alice, bob = couple(world)
    world.advance(60)
    alice.keepalive()
    world.advance(60)
    assert list(world.service.registry.leases) == [alice.control.public]
    assert alice.call(bob).status == "unknown"
    assert alice.ask(m.Find(id=1, node=bob.id)) == [
        m.Found(id=1, record=bob.record.encode(), certificate=bob.certificate.encode())
    ]


def test_moved_node_is_believed_only_with_a_cookie_for_its_new_address(world: World) -> None:
    alice, bob = couple(world)
    (reply,) = world.send(alice.seal(m.Keepalive(id=1, seq=alice.next_seq(), epoch=0, version=0)), ELSEWHERE)
    assert len(reply) == 76
    assert world.service.registry.leases[alice.control.public].endpoint == ALICE
    answer = only(alice.keepalive(source=ELSEWHERE), m.KeepaliveReply)
    assert answer.observed == ELSEWHERE
    assert world.service.registry.leases[alice.control.public].endpoint == ELSEWHERE
    bob.call(alice)
    assert world.received[-1][1] == ELSEWHERE


def test_replayed_register_does_not_move_the_lease(world: World) -> None:
    node = Node(world, "alice", ALICE)
    node.ask(node.registration(), retry=False)
    captured = node.seal(node.registration())
    world.send(captured, ALICE)
    assert world.service.registry.leases[node.control.public].endpoint == ALICE
    for source in (ELSEWHERE, UdpEndpoint(ALICE.host, ALICE.port + 1)):
        (reply,) = world.send(captured, source)
        assert len(reply) == 76
    (reply,) = world.send(captured, ALICE)
    assert code([answer for answer in [node.take(reply)] if answer]) == "stale-sequence"
    assert world.service.registry.leases[node.control.public].endpoint == ALICE


def test_mapped_socket_is_the_one_that_the_node_spoke_to(world: World) -> None:
    node = Node(world, "alice", ALICE)
    node.ask(node.registration(), local=1)
    bob = Node(world, "bob", BOB)
    bob.register()
    bob.call(node)
    assert world.received[-1][1:] == (ALICE, 1)


def test_expired_certificate_ends_lease_record_and_channels(world: World) -> None:
    alice, bob = couple(world)
    carol = Node(world, "carol", ELSEWHERE)
    carol.certificate = world.certificate("carol", carol.signing, not_after=UNIX + world.now + 30)
    carol.record = carol.sign()
    carol.register()
    channel = carol.call(alice).channel
    world.advance(20)
    assert world.send(pack_header(channel) + b"x", ELSEWHERE) == []
    assert world.received[-1][1] == ALICE
    world.advance(30)
    world.received.clear()
    assert code(carol.keepalive()) == "unregistered"
    assert alice.ask(m.Find(id=1, node=carol.id)) == [m.Found(id=1)]
    world.send(pack_header(channel) + b"x", ELSEWHERE)
    assert world.received == []
    assert only(bob.ask(m.Pull(id=1, epoch=0, since=0)), m.Page)


def test_record_of_a_node_that_is_away_ends_with_a_tombstone(world: World) -> None:
    alice, bob = couple(world)
    epoch = world.service.registry.epoch
    bob.record = bob.sign(life=120)
    version = bob.register().version
    for _ in range(10):
        world.advance(30)
        alice.keepalive()
    page = only(alice.ask(m.Pull(id=1, epoch=epoch, since=version)), m.Page)
    assert page.gone == (bob.id,)


# Directory


def test_pull_gives_all_to_who_has_nothing_and_changes_afterwards(world: World) -> None:
    alice, bob = couple(world)
    page = only(alice.ask(m.Pull(id=7, epoch=0, since=0)), m.Page)
    assert page.id == 7
    assert {record for record, _ in page.items} == {alice.record.encode(), bob.record.encode()}
    bob.record = bob.sign()
    bob.register()
    page = only(alice.ask(m.Pull(id=8, epoch=page.epoch, since=page.version)), m.Page)
    assert page.items == ((bob.record.encode(), b""),)


def test_pull_from_another_epoch_or_from_beyond_is_sent_to_the_digests(world: World) -> None:
    alice, bob = couple(world)
    epoch = world.service.registry.epoch
    assert code(alice.ask(m.Pull(id=1, epoch=epoch ^ 1, since=1))) == "digests-needed"
    assert code(alice.ask(m.Pull(id=1, epoch=epoch, since=99))) == "digests-needed"
    known = ((alice.id, alice.record.seq), (bob.id, bob.record.seq))
    request = m.PullDigests(id=2, first=bytes(16), last=b"\xff" * 16, known=known)
    assert only(alice.ask(request), m.Page).items == ()
    bob.record = bob.sign()
    bob.register()
    page = only(alice.ask(request), m.Page)
    assert page.items == ((bob.record.encode(), bob.certificate.encode()),)


def test_window_bounds_the_pages_and_the_rate_bounds_the_windows() -> None:
    world = World(limits=SourceLimits(page_rate=10))
    nodes = [Node(world, f"n{number}", UdpEndpoint("198.51.100.1", 1000 + number)) for number in range(20)]
    for node in nodes:
        node.register()
    asker = nodes[0]
    world.collect(ALICE)
    assert len(asker.ask(m.Pull(id=1, epoch=0, since=0, window=6))) == 6
    assert len(asker.ask(m.Pull(id=1, epoch=0, since=0, window=6))) == 6
    assert len(asker.ask(m.Pull(id=1, epoch=0, since=0, window=16))) == 8
    assert asker.ask(m.Pull(id=1, epoch=0, since=0, window=6)) == []
    assert world.service.drops()["page-rate"] == 1
    world.now += 0.5
    assert len(asker.ask(m.Pull(id=1, epoch=0, since=0, window=6))) == 5


def test_find_answers_by_node_and_by_address(world: World) -> None:
    alice, bob = couple(world)
    address = str(bob.certificate.prefixes4[0][9])
    assert alice.find(address).record == bob.record.encode()
    assert alice.find("192.0.2.55").record == b""
    found = only(alice.ask(m.Find(id=3, node=bob.id)), m.Found)
    assert (found.record, found.certificate) == (bob.record.encode(), bob.certificate.encode())
    assert only(alice.ask(m.Find(id=3, address=ip_address("fd00::1").packed)), m.Found).record == b""


def test_changes_are_told_to_all_in_one_message_at_most_every_100_ms(world: World) -> None:
    alice, bob = couple(world)
    for _ in range(5):
        bob.record = bob.sign()
        bob.register()
    world.advance(0.05)
    first = [notify.version for notify in alice.pushed(m.Notify)]
    assert len(first) <= 1
    world.advance(0.2)
    told = [notify.version for notify in alice.pushed(m.Notify)]
    assert told[-1] == 7
    assert len(told) <= 2
    assert bob.pushed(m.Notify) == []
    world.received.clear()
    world.advance(10)
    assert world.received == []


def test_lost_notification_is_made_good_by_the_keepalive(world: World) -> None:
    alice, bob = couple(world)
    bob.record = bob.sign()
    bob.register()
    world.advance(1.0)
    assert only(alice.keepalive(), m.KeepaliveReply).version == 3


def test_networks_on_one_rendezvous_do_not_see_each_other() -> None:
    world = World()
    alice = Node(world, "alice", ALICE)
    first, world.ca = world.ca, SigningKey.generate(world.random.randbytes)
    bob = Node(world, "bob", BOB)
    networks = [first.public, world.ca.public]
    old = world.service
    world.service = type(old)(world.key, networks, old.stun.locals, world.random.randbytes, world.now, UNIX)
    alice.register()
    bob.register()
    assert alice.call(bob).status == "unknown"
    assert only(alice.ask(m.Find(id=1, node=bob.id)), m.Found).record == b""
    page = only(alice.ask(m.Pull(id=1, epoch=0, since=0)), m.Page)
    assert [record for record, _ in page.items] == [alice.record.encode()]
    assert world.received == []


# Blocklists


def test_blocklist_is_served_in_parts(world: World) -> None:
    alice, _ = couple(world)
    encoded = world.blocklist(3, {f"gone-{number:03}.example.org": number for number in range(100)})
    world.service.set_blocklist(encoded, world.now)
    got, total = b"", 1
    while len(got) < total:
        part = only(alice.ask(m.GetBlocklist(id=1, serial=0, offset=len(got))), m.BlocklistPart)
        assert (part.serial, part.offset) == (3, len(got))
        got, total = got + part.data, part.total
    assert got == encoded
    assert only(alice.ask(m.GetBlocklist(id=1, serial=2, offset=500)), m.BlocklistPart).offset == 0


def test_no_blocklist_is_serial_0(world: World) -> None:
    alice, _ = couple(world)
    part = only(alice.ask(m.GetBlocklist(id=1)), m.BlocklistPart)
    assert (part.serial, part.total, part.data) == (0, 0, b"")


def test_revoked_node_loses_lease_record_and_channels_and_all_are_told(world: World) -> None:
    alice, bob = couple(world)
    channel = alice.call(bob).channel
    world.received.clear()
    world.service.set_blocklist(world.blocklist(1, {"bob": bob.certificate.serial + 1}), world.now)
    world.advance(0.5)
    assert alice.pushed(m.Notify)
    page = only(alice.ask(m.Pull(id=1, epoch=world.service.registry.epoch, since=2)), m.Page)
    assert page.gone == (bob.id,)
    world.received.clear()
    world.send(pack_header(channel) + b"x", ALICE)
    assert world.received == []
    assert code(bob.ask(bob.registration())) == "revoked"


def test_older_or_foreign_blocklist_is_refused(world: World) -> None:
    world.service.set_blocklist(world.blocklist(5, {}), world.now)
    with pytest.raises(IdentityError, match="blocklist-stale"):
        world.service.set_blocklist(world.blocklist(4, {}), world.now)
    other = SigningKey.generate(world.random.randbytes)
    with pytest.raises(WireError, match="foreign-network"):
        world.service.set_blocklist(world.blocklist(9, {}, ca=other), world.now)
