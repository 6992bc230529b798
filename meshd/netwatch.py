"""Which of the host's network events matter to how this node is reached.

Most do not: our own routes, the pods' links, an address whose lifetime was put off. Each that does costs a
look at the host, and only a look that finds something new costs datagrams: where we are seen, the NAT's kind.
"""

from __future__ import annotations

from typing import NamedTuple

from crossedge.host.links import IFF_UP, Link
from crossedge.host.monitor import Event
from crossedge.host.routes import Route
from crossedge.host.vethpair import far_name

IFF_RUNNING = 0x40  # there is a carrier


class Found(NamedTuple):
    """What a look at the host found."""

    addresses: tuple[str, ...]
    """That may be candidates, those on the way out first."""
    ways: tuple[Route, ...]
    """The default route of each IP version that has one."""


class Change(NamedTuple):
    """What is new since the look before."""

    news: bool
    """Addresses or ways out are others, or the way out lost its carrier for a while."""
    moved: bool
    """The way out is another one, whatever the addresses say."""


class NetworkWatch:
    """Compares."""

    def __init__(self, tun: str) -> None:
        """`tun` is the name of our own interface; the far end of a veth pair is ours, too."""
        self._ours = {tun, far_name(tun)}
        self._found: Found | None = None
        self._links: dict[int, tuple[int, int]] = {}
        self._flapped = False

    def concerns(self, event: Event) -> bool:
        """Tell whether to look at the host because of an event."""
        item = event.item
        if isinstance(item, Route):
            return not item.destination.prefixlen
        if isinstance(item, Link):
            return item.name not in self._ours and self._link(item, deleted=event.deleted)
        return True

    def _link(self, link: Link, *, deleted: bool) -> bool:
        """Tell whether more than a counter of a link changed; drivers report scans and the like too."""
        known = self._links.get(link.index)
        state = (link.flags & (IFF_UP | IFF_RUNNING), link.mtu)
        if deleted:
            self._links.pop(link.index, None)
        elif known == state:
            return False
        else:
            self._links[link.index] = state
        ways = () if self._found is None else self._found.ways
        if known is not None and known[0] != state[0] and any(way.device == link.index for way in ways):
            self._flapped = True
        return True

    def look(self, found: Found) -> Change:
        """Take what was found and return what is new in it."""
        before, self._found = self._found, found
        flapped, self._flapped = self._flapped, False
        if before is None:
            return Change(True, False)
        moved = flapped or found.ways != before.ways
        return Change(moved or found.addresses != before.addresses, moved)
