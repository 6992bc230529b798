"""Pulls end with everything that the rendezvous has, whatever is lost, reordered or changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from crossedge.lab.chance import Chance
from crossedge.meshd.client_blocklist import WINDOW, BlocklistFetch
from crossedge.meshd.client_sync import DirectorySync
from crossedge.rendezvous.pages import digests, pull
from crossedge.rendezvous.registry import Directory
from crossedge.wire.certificate import Certificate
from crossedge.wire.identity import SigningKey, key_id, network_id
from crossedge.wire.limits import MAX_BLOCKLIST
from crossedge.wire.messages import MAX_PART, BlocklistPart, GetBlocklist, Page, Pull, PullDigests
from crossedge.wire.record import Record

CHANCE = Chance("sync")
CA = SigningKey.generate(CHANCE.token)
SIGNING = SigningKey.generate(CHANCE.token)  # one for all: nothing is verified here
COUNT = 130


def certify(number: int) -> Certificate:
    return Certificate(
        network=network_id(CA.public),
        serial=number,
        name=f"node-{number}",
        x25519=CHANCE.token(32),
        ed25519=SIGNING.public,
        not_before=0,
        not_after=2**40,
        issuer=key_id(CA.public),
    ).sign(CA)


CERTIFICATES = [certify(number) for number in range(COUNT)]


class Exchange:
    """A directory at one end, what was pulled of it at the other, and a lossy way between."""

    def __init__(self, seed: int = 1, loss: float = 0.0, shuffle: bool = False) -> None:
        self.chance = Chance(seed)
        self.loss = loss
        self.shuffle = shuffle
        self.epoch = 7
        self.there = Directory(CA.public, 10_000)
        self.here: dict[bytes, int] = {}
        self.sync = DirectorySync(lambda: sorted(self.here.items()))
        self.questions = 0
        self.records = 0
        self.between: Callable[[], None] = lambda: None

    def put(self, number: int, seq: int) -> None:
        certificate = CERTIFICATES[number]
        record = Record(
            node_id=certificate.node_id,
            certificate=certificate.fingerprint,
            control_key=bytes(32),
            seq=seq,
            issued=0,
            expires=1,
        ).sign(SIGNING)
        self.there.put(certificate, record)

    def remove(self, number: int) -> None:
        self.there.remove(self.there.nodes[CERTIFICATES[number].node_id])

    def restart(self) -> None:
        """Let the server forget its history and keep its records."""
        old = self.there
        self.epoch += 1
        self.there = Directory(CA.public, 10_000)
        for node in old.nodes.values():
            self.there.put(Certificate.decode(node.certificate), Record.decode(node.record))

    def pull(self, most: int = 500) -> None:
        """Pull until the pull says that it has ended."""
        self.sync.heard(self.epoch, self.there.version)
        self.sync.begin()
        for _ in range(most):
            question = self.sync.request(1, 0.0)
            self.questions += 1
            self.between()
            if self.ask(question):
                return
        raise AssertionError("does not end")

    def ask(self, question: object) -> bool:
        if isinstance(question, Pull):
            if question.since and (question.epoch != self.epoch or question.since < self.there.floor):
                self.sync.begin_digests()
                return False
            pages = pull(self.there, 1, self.epoch, question.since, question.window)
        else:
            assert isinstance(question, PullDigests)
            pages = digests(
                self.there, 1, self.epoch, question.first, question.last, question.known, question.window
            )
        pages = [page for page in pages if self.chance.uniform() >= self.loss]
        if self.shuffle:
            pages.sort(key=lambda _: self.chance.bits())
        for page in pages:
            self.records += len(page.items)
            for record, _ in page.items:
                decoded = Record.decode(record)
                self.here[decoded.node_id] = max(decoded.seq, self.here.get(decoded.node_id, 0))
            for node in page.gone:
                self.here.pop(node, None)
            ended = self.sync.take(page)
            if ended is not None:
                return ended
        return False

    def assert_same(self) -> None:
        assert self.here == {node.id: node.seq for node in self.there.nodes.values()}
        assert (self.sync.epoch, self.sync.version) == (self.epoch, self.there.version)
        assert not self.sync.behind


def test_everything_comes_at_first_then_only_what_changed() -> None:
    exchange = Exchange()
    for number in range(COUNT):
        exchange.put(number, 1)
    exchange.pull()
    exchange.assert_same()
    assert exchange.records == COUNT
    exchange.put(3, 2)
    exchange.remove(4)
    exchange.questions = 0
    exchange.pull()
    exchange.assert_same()
    assert (exchange.questions, exchange.records) == (1, COUNT + 1)


def test_a_restarted_server_costs_digests_not_records() -> None:
    exchange = Exchange()
    for number in range(COUNT):
        exchange.put(number, 1)
    exchange.pull()
    exchange.restart()
    exchange.put(5, 9)
    exchange.records = exchange.questions = 0
    exchange.pull()
    exchange.assert_same()
    assert exchange.records == 1
    assert exchange.questions == -(-COUNT // 40)


def test_who_was_away_too_long_for_the_tombstones_is_sent_to_the_digests() -> None:
    exchange = Exchange()
    for number in range(60):
        exchange.put(number, 1)
    exchange.pull()
    exchange.remove(9)
    exchange.put(1, 2)
    exchange.there.floor = exchange.there.version
    exchange.pull()
    exchange.assert_same()


@pytest.mark.parametrize("seed", range(30))
def test_loss_reordering_and_changes_meanwhile_leave_no_gap(seed: int) -> None:
    exchange = Exchange(seed, loss=0.3, shuffle=True)
    chance = Chance(f"changes {seed}")
    for number in range(COUNT):
        exchange.put(number, 1)
    seq = 1

    def change() -> None:
        nonlocal seq
        seq += 1
        number = chance.below(COUNT)
        known = CERTIFICATES[number].node_id in exchange.there.nodes
        if known and chance.below(4) == 0:
            exchange.remove(number)
        else:
            exchange.put(number, seq)

    exchange.between = change
    for turn in range(4):
        exchange.pull()
        if turn % 2:
            exchange.restart()
    exchange.between = lambda: None
    exchange.pull()
    exchange.assert_same()


def test_news_from_during_a_pull_is_not_forgotten() -> None:
    sync = DirectorySync(list)
    sync.heard(1, 5)
    sync.begin()
    sync.request(1, 0.0)
    sync.heard(1, 6)
    assert sync.take(Page(id=1, epoch=1, version=5)) is True
    assert sync.behind


def test_a_promise_that_is_not_kept_does_not_keep_us_asking() -> None:
    sync = DirectorySync(list)
    sync.heard(1, 2**63)
    sync.begin()
    sync.request(1, 0.0)
    assert sync.take(Page(id=1, epoch=1, version=5)) is True
    assert not sync.behind


@pytest.mark.parametrize(
    "page",
    [
        Page(id=1, epoch=1, version=0, more=True),
        Page(id=1, epoch=1, version=5, next=bytes(16), more=True),
    ],
)
def test_pages_that_lead_nowhere_end_the_pull(page: Page) -> None:
    sync = DirectorySync(lambda: [(bytes(15) + b"\1", 1)])
    sync.heard(1, 5)
    if page.next:
        sync.begin()
    sync.request(1, 0.0)
    assert sync.take(page) is True


def test_pages_beyond_the_window_are_ignored() -> None:
    sync = DirectorySync(list)
    sync.heard(1, 5)
    sync.begin()
    sync.request(1, 0.0)
    assert sync.take(Page(id=1, epoch=1, version=9, index=60_000)) is None
    assert sync.take(Page(id=1, epoch=1, version=5)) is True


# --- Blocklists in parts ------------------------------------------------------------------------------


def part(serial: int, total: int, offset: int, size: int | None = None) -> BlocklistPart:
    data = bytes(min(MAX_PART, total - offset) if size is None else size)
    return BlocklistPart(id=1, serial=serial, total=total, offset=offset, data=data)


def test_parts_are_asked_for_in_a_window_and_put_together() -> None:
    fetch = BlocklistFetch(held=3)
    total = 20 * MAX_PART + 7
    assert (fetch.next_offset(), fetch.next_offset()) == (0, None)
    asked = [0]
    while (encoded := fetch.whole()) is None:
        assert fetch.take(part(4, total, asked.pop(0)))
        while (offset := fetch.next_offset()) is not None:
            asked.append(offset)
        assert len(asked) <= WINDOW
    assert len(encoded) == total
    question = fetch.question(MAX_PART)(9, 0.0)
    assert isinstance(question, GetBlocklist)
    assert (question.serial, question.offset) == (4, MAX_PART)


@pytest.mark.parametrize(
    "bad",
    [
        part(3, 10, 0),
        part(4, 0, 0, 0),
        part(4, MAX_BLOCKLIST + 1, 0),
        part(4, 5000, 1024),
        part(4, 5000, 0, 9),
    ],
)
def test_parts_that_do_not_fit_end_the_fetch(bad: BlocklistPart) -> None:
    fetch = BlocklistFetch(held=3)
    fetch.next_offset()
    assert not fetch.take(bad)


def test_a_list_that_changes_meanwhile_ends_the_fetch() -> None:
    fetch = BlocklistFetch(held=3)
    fetch.next_offset()
    assert fetch.take(part(4, 5000, 0))
    fetch.next_offset()
    assert not fetch.take(part(5, 5000, 1024))
