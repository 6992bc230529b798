"""What a mesh tells its shell: `Mesh.poll_event` returns these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from crossedge.meshd.link import Link
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class LinkReady:
    """Frames wait in the link's queue and it can take some of them now: flush it."""

    link: Link


@dataclass(frozen=True, slots=True)
class RoutesChanged:
    """`Mesh.routes()` gives other prefixes, or the same ones with another MTU."""


@dataclass(frozen=True, slots=True)
class PathChanged:
    """A peer's data takes other endpoints now; for the log."""

    peer: str
    old: tuple[Endpoint, ...]
    new: tuple[Endpoint, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Direct:
    """The first data of a pair that was cold went out on a proven direct path."""

    peer: str
    seconds: float
    """From the first packet that wanted the pair, taken from the TUN, until now."""


@dataclass(frozen=True, slots=True)
class SessionChanged:
    """A session came up ("up"), expired ("expired"), failed ("failed") or was closed ("idle", "removed")."""

    peer: str
    state: str


@dataclass(frozen=True, slots=True)
class StateToPersist:
    """Members changed: directory and active peers are to be persisted within some seconds."""


@dataclass(frozen=True, slots=True)
class BlocklistToPersist:
    """A newer blocklist holds; it must be durable before the daemon ends, because serials never decrease."""

    blocklist: Blocklist


@dataclass(frozen=True, slots=True)
class PingResult:
    """The answer, or the lack of one, to one probe that `Mesh.ping` asked for."""

    peer: str
    number: int
    """Counts the probes of this ping from 1."""
    endpoint: Endpoint | None
    rtt: float | None
    """Seconds; None: no answer came in time."""
    note: str = ""
    """Why there is no answer, where that is known."""


@dataclass(frozen=True, slots=True)
class ReachChanged:
    """This node has peers and reaches none (`cut_off`), or that is over."""

    cut_off: bool


@dataclass(frozen=True, slots=True)
class SocketsFreed:
    """These further sockets are not used any more: close those that are open."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that an operator should read, once: `level` is "info", "warning" or "error"."""

    level: str
    text: str


MeshEvent: TypeAlias = (
    LinkReady
    | RoutesChanged
    | PathChanged
    | Direct
    | SessionChanged
    | StateToPersist
    | BlocklistToPersist
    | PingResult
    | ReachChanged
    | SocketsFreed
    | Notice
)
