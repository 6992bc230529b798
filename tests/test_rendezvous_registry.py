"""The directory: the newest record of each node, and exactly what changed since a version."""

from __future__ import annotations

import pytest

from crossedge.rendezvous import registry as registry_module
from crossedge.rendezvous.pages import digests, pull
from crossedge.rendezvous.registry import Directory
from crossedge.wire.errors import WireError
from crossedge.wire.limits import MAX_PLAINTEXT
from crossedge.wire.messages import Page, encode
from tests.rendezvous_client import Node, World

FIRST, LAST = bytes(16), b"\xff" * 16


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def directory(world: World) -> Directory:
    return Directory(world.ca.public, 100)


def fill(world: World, directory: Directory, count: int) -> list[Node]:
    nodes = [Node(world, f"n{number}") for number in range(count)]
    for node in nodes:
        directory.put(node.certificate, node.record)
    return nodes


def items(pages: list[Page]) -> list[tuple[bytes, bytes]]:
    return [item for page in pages for item in page.items]


def test_same_statements_again_change_nothing(world: World, directory: Directory) -> None:
    (node,) = fill(world, directory, 1)
    directory.put(node.certificate, node.record)
    assert directory.version == 1


def test_pull_gives_what_came_after_and_the_certificate_only_if_it_did(
    world: World, directory: Directory
) -> None:
    first, second, third = fill(world, directory, 3)
    assert items(pull(directory, 1, 9, 2, 4)) == [(third.record.encode(), third.certificate.encode())]
    record = first.sign()
    directory.put(first.certificate, record)
    (page,) = pull(directory, 1, 9, 3, 4)
    assert page.items == ((record.encode(), b""),)
    assert (page.version, page.more) == (4, False)
    assert [record for record, _ in items(pull(directory, 1, 9, 0, 4))] == [
        second.record.encode(),
        third.record.encode(),
        record.encode(),
    ]


def test_pull_of_nothing_new_is_one_empty_page_with_the_version(world: World, directory: Directory) -> None:
    fill(world, directory, 2)
    (page,) = pull(directory, 7, 9, 2, 4)
    assert (page.id, page.items, page.version, page.more) == (7, (), 2, False)


def test_pages_fit_a_message_and_windows_join_without_gap_or_double(
    world: World, directory: Directory
) -> None:
    nodes = fill(world, directory, 30)
    since, got, rounds = 0, [], 0
    while True:
        pages = pull(directory, 1, 9, since, 3)
        assert [page.index for page in pages] == list(range(len(pages)))
        assert all(len(encode(page)) <= MAX_PLAINTEXT for page in pages)
        assert all(page.more for page in pages[:-1])
        got += items(pages)
        since, rounds = pages[-1].version, rounds + 1
        if not pages[-1].more:
            break
    assert rounds > 2
    assert since == directory.version
    assert sorted(got) == sorted((node.record.encode(), node.certificate.encode()) for node in nodes)


def test_each_page_tells_the_version_up_to_which_it_is_whole(world: World, directory: Directory) -> None:
    fill(world, directory, 10)
    first, second, *_ = pull(directory, 1, 9, 0, 3)
    assert items(pull(directory, 1, 9, first.version, 1)) == list(second.items)


def test_removed_node_leaves_a_tombstone_until_it_is_back(world: World, directory: Directory) -> None:
    first, second = fill(world, directory, 2)
    directory.remove(directory.nodes[first.id])
    (page,) = pull(directory, 1, 9, 2, 4)
    assert (page.gone, page.items, page.version) == ((first.id,), (), 3)
    (page,) = pull(directory, 1, 9, 0, 4)
    assert [record for record, _ in page.items] == [second.record.encode()]
    directory.put(first.certificate, first.record)
    (page,) = pull(directory, 1, 9, 2, 4)
    assert (page.gone, page.items) == ((), ((first.record.encode(), first.certificate.encode()),))


def test_tombstones_are_bounded_and_the_floor_says_so(
    world: World, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "TOMBSTONES", 3)
    for node in fill(world, directory, 6)[:5]:
        directory.remove(directory.nodes[node.id])
    assert directory.tombstones == 3
    assert directory.floor == 8


def test_history_does_not_grow_with_changes_of_the_same_nodes(world: World, directory: Directory) -> None:
    node, other = fill(world, directory, 2)
    for _ in range(600):
        record = node.sign()
        directory.put(node.certificate, record)
    assert len(directory._log) < 400
    assert items(pull(directory, 1, 9, 1, 4)) == [
        (other.record.encode(), other.certificate.encode()),
        (record.encode(), b""),
    ]


def test_digests_cost_nothing_for_what_is_held_and_give_the_rest(world: World, directory: Directory) -> None:
    nodes = fill(world, directory, 6)
    known = [(node.id, node.record.seq) for node in nodes]
    (page,) = digests(directory, 1, 9, FIRST, LAST, known, 4)
    assert (page.items, page.gone, page.more, page.next) == ((), (), False, b"")
    newer = nodes[0].sign()
    directory.put(nodes[0].certificate, newer)
    pages = digests(directory, 1, 9, FIRST, LAST, known[:-1], 4)
    assert sorted(items(pages)) == sorted(
        [
            (newer.encode(), nodes[0].certificate.encode()),
            (nodes[-1].record.encode(), nodes[-1].certificate.encode()),
        ]
    )
    assert all(page.version == directory.version for page in pages)


def test_digests_stay_in_their_range_and_tell_where_they_stopped(world: World, directory: Directory) -> None:
    nodes = sorted(fill(world, directory, 12), key=lambda node: node.id)
    first, got = nodes[2].id, []
    while first:
        pages = digests(directory, 1, 9, first, nodes[9].id, (), 2)
        got += items(pages)
        assert all(page.more for page in pages[:-1])
        assert pages[-1].more == bool(pages[-1].next)
        first = pages[-1].next
    assert [record for record, _ in got] == [node.record.encode() for node in nodes[2:10]]


def test_digests_call_gone_only_what_was_removed_here(world: World, directory: Directory) -> None:
    removed, kept = fill(world, directory, 2)
    stranger = Node(world, "elsewhere")
    directory.remove(directory.nodes[removed.id])
    known = [(node.id, node.record.seq) for node in (removed, kept, stranger)]
    (page,) = digests(directory, 1, 9, FIRST, LAST, known, 4)
    assert page.gone == (removed.id,)


def test_longest_prefix_of_a_certificate_answers_for_an_address(world: World, directory: Directory) -> None:
    wide, narrow = Node(world, "wide"), Node(world, "narrow")
    wide.certificate = world.certificate("wide", wide.signing, prefix="10.170.0.0/16")
    narrow.certificate = world.certificate("narrow", narrow.signing, prefix="10.170.5.0/24")
    for node in (wide, narrow):
        directory.put(node.certificate, node.sign(certificate=node.certificate))
    found = directory.find(bytes([10, 170, 5, 9]))
    assert found is not None
    assert found.id == narrow.id
    found = directory.find(bytes([10, 170, 6, 9]))
    assert found is not None
    assert found.id == wide.id
    assert directory.find(bytes([10, 171, 0, 1])) is None
    assert directory.find(bytes(16)) is None
    directory.remove(directory.nodes[narrow.id])
    found = directory.find(bytes([10, 170, 5, 9]))
    assert found is not None
    assert found.id == wide.id


def test_prefix_that_moved_to_another_node_belongs_to_the_newer_certificate(
    world: World, directory: Directory
) -> None:
    old, new = Node(world, "old"), Node(world, "new")
    old.certificate = world.certificate("old", old.signing, prefix="10.170.0.0/24")
    new.certificate = world.certificate("new", new.signing, prefix="10.170.0.0/24")
    directory.put(new.certificate, new.sign(certificate=new.certificate))
    directory.put(old.certificate, old.sign(certificate=old.certificate))
    found = directory.find(bytes([10, 170, 0, 9]))
    assert found is not None
    assert found.id == new.id


def test_older_certificate_of_a_name_is_superseded(world: World, directory: Directory) -> None:
    (node,) = fill(world, directory, 1)
    newer = world.certificate(node.name, node.signing)
    directory.put(newer, node.sign(certificate=newer))
    with pytest.raises(WireError, match="superseded"):
        directory.put(node.certificate, node.sign())
    (page,) = pull(directory, 1, 9, 1, 4)
    assert page.items[0][1] == newer.encode()


def test_directory_is_bounded(world: World) -> None:
    directory = Directory(world.ca.public, 3)
    nodes = fill(world, directory, 3)
    extra = Node(world, "extra")
    with pytest.raises(WireError, match="directory-full"):
        directory.put(extra.certificate, extra.record)
    directory.put(nodes[0].certificate, nodes[0].sign())
    assert len(directory.nodes) == 3
