"""What is done, while a pair has traffic, where nothing direct is left or the peer fell silent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crossedge.meshd.handshaking import NEVER
from crossedge.meshd.path import State
from crossedge.meshd.peerport import Port
from crossedge.meshd.punch import Phase
from crossedge.meshd.session import Session

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer

SILENT: Final = 2.0  # seconds without a sign of life, with traffic, after which new keys are tried
SILENT_AGAIN: Final = 5.0
DOUBT_AGAIN: Final = 5.0  # seconds between calls because no direct path is good any more


class Liveness:
    """The watch over one peer; it calls the peer anew, or makes new keys."""

    __slots__ = ("_called_at", "_peer", "_port", "_retry", "_tried_at")

    def __init__(self, peer: MeshPeer, port: Port) -> None:
        self._peer = peer
        self._port = port
        self._called_at = NEVER  # since nothing was direct, in seconds of `now`
        self._tried_at = NEVER  # new keys, since it was silent
        self._retry = False

    def try_again(self) -> None:
        """Punch anew where that had failed: something changed. At once, but not again and again."""
        if self._peer.active and self._peer.punch.phase in (Phase.PAUSED, Phase.SPENT):
            self._retry = True
            self._port.touch(self._peer)

    def called(self, now: float) -> None:
        """Note that the peer is called anew."""
        self._called_at = now
        self._retry = False

    def watch(self, session: Session, now: float) -> None:
        """Notice what is wrong, and do about it what is due."""
        peer = self._peer
        if not peer.lively(now):
            return
        up = peer.up(now)
        cut_off = not up or not any(path.state is State.PROVEN for path in peer.paths.directs())
        self._retry = self._retry and cut_off
        if (
            cut_off
            and (not up or self._retry or peer.punch.phase in (Phase.IDLE, Phase.DONE))
            and now - self._called_at >= DOUBT_AGAIN
        ):
            if not self._retry:
                self._port.rebind(peer, now)
            peer.recall(now)
        heard = peer.last_heard if peer.last_heard is not None else now
        if up and now - heard >= SILENT and now - self._tried_at >= SILENT_AGAIN:
            self._tried_at = now
            session.initiate(now, urgent=True)
            self._port.call(peer, 0, now)  # what there was of relays may be gone

    def deadlines(self, now: float) -> list[float]:
        """Return when `watch` may have something to do, in seconds of `now`."""
        peer = self._peer
        times: list[float] = []
        if not peer.lively(now):
            return times
        up = peer.up(now)
        if up:
            times.append(max((peer.last_heard or now) + SILENT, self._tried_at + SILENT_AGAIN))
        if self._retry or not up:
            times.append(max(now, self._called_at + DOUBT_AGAIN))
        return times
