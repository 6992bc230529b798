"""Directory pages: as many records as fit one control message, as many messages as the asker has room for."""

from __future__ import annotations

from collections.abc import Iterable

from crossedge.rendezvous.registry import Directory
from crossedge.wire.limits import MAX_PLAINTEXT
from crossedge.wire.messages import Page

PAGE_OVERHEAD = 72
"""Bytes of a page without items: map, keys, id, epoch, version, index, next."""
ITEM_OVERHEAD = 7
"""Bytes around one record and one certificate."""
MAX_ITEMS = 16
MAX_GONE = 64
ROOM = MAX_PLAINTEXT - PAGE_OVERHEAD


class _Draft:
    """A page that is being filled."""

    __slots__ = ("gone", "items", "room", "version")

    def __init__(self, version: int) -> None:
        self.items: list[tuple[bytes, bytes]] = []
        self.gone: list[bytes] = []
        self.room = ROOM
        self.version = version

    def add(self, record: bytes, certificate: bytes) -> bool:
        size = len(record) + len(certificate) + ITEM_OVERHEAD
        if size > self.room or len(self.items) == MAX_ITEMS:
            return False
        self.room -= size
        self.items.append((record, certificate))
        return True

    def add_gone(self, node_id: bytes) -> bool:
        if self.room < len(node_id) or len(self.gone) == MAX_GONE:
            return False
        self.room -= len(node_id)
        self.gone.append(node_id)
        return True

    def page(self, id_: int, epoch: int, more: bool, index: int, next_: bytes = b"") -> Page:
        return Page(
            id=id_,
            epoch=epoch,
            version=self.version,
            items=tuple(self.items),
            gone=tuple(self.gone),
            more=more,
            index=index,
            next=next_,
        )


def pull(directory: Directory, id_: int, epoch: int, since: int, window: int) -> list[Page]:
    """Return at most `window` pages of what changed after version `since`; at least one, be it empty.

    A certificate is in the page if it came after `since`. A page's version is that of the last change in it
    or, where nothing follows, the directory's.
    """
    drafts = [_Draft(since)]
    for version, node_id, node in directory.changes(since):
        certificate = node.certificate if node is not None and node.certificate_since > since else b""
        while not (
            drafts[-1].add_gone(node_id) if node is None else drafts[-1].add(node.record, certificate)
        ):
            if len(drafts) == window:
                return [draft.page(id_, epoch, True, index) for index, draft in enumerate(drafts)]
            drafts.append(_Draft(version))
        drafts[-1].version = version
    drafts[-1].version = directory.version
    last = len(drafts) - 1
    return [draft.page(id_, epoch, index < last, index) for index, draft in enumerate(drafts)]


def digests(
    directory: Directory,
    id_: int,
    epoch: int,
    first: bytes,
    last: bytes,
    known: Iterable[tuple[bytes, int]],
    window: int,
) -> list[Page]:
    """Return at most `window` pages of what the asker lacks between two node ids.

    Every item has its certificate: the asker comes from another history, so what it holds is not known. Gone
    is only what was removed here; a node that never was here may well be registered elsewhere. `next` is
    where the last page stopped.
    """
    held = dict(known)
    drafts = [_Draft(directory.version)]
    for node_id in held:
        if directory.is_gone(node_id) and not drafts[0].add_gone(node_id):
            break
    for node in directory.between(first, last):
        if held.get(node.id, -1) >= node.seq:
            continue
        while not drafts[-1].add(node.record, node.certificate):
            if len(drafts) == window:
                end = len(drafts) - 1
                return [
                    draft.page(id_, epoch, True, index, node.id if index == end else b"")
                    for index, draft in enumerate(drafts)
                ]
            drafts.append(_Draft(directory.version))
    end = len(drafts) - 1
    return [draft.page(id_, epoch, index < end, index) for index, draft in enumerate(drafts)]
