"""What a client fetches on its own: the directory whenever it changed, and a blocklist when asked to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from crossedge.meshd.client_blocklist import BlocklistFetch
from crossedge.meshd.client_channel import SealedChannel
from crossedge.meshd.client_events import BlocklistArrived, ClientEvent, RecordsArrived, Synced
from crossedge.meshd.client_requests import Request
from crossedge.meshd.client_sync import DirectorySync, Known
from crossedge.wire import messages as m

TRIES: Final = 5  # sends of a question for a part of a blocklist
SILENCES: Final = 8  # times that nothing came in time, in a row, until a pull is left for later
LATER: Final = 5.0  # seconds
SPREAD: Final = 0.2  # seconds at most by which a pull is put off: all hear of a change at one time
PAST_EPOCHS: Final = 8  # epochs of earlier lives, whose notifications can only be replays


class Puller:
    """The pulls from one rendezvous. Core, driven by its client."""

    def __init__(
        self,
        server: bytes,
        channel: SealedChannel,
        known: Known,
        emit: Callable[[ClientEvent], None],
        uniform: Callable[[], float],
    ) -> None:
        self.sync = DirectorySync(known)
        self.due: float | None = None
        """When to begin the next pull."""
        self._server = server
        self._channel = channel
        self._emit = emit
        self._uniform = uniform
        self._request: Request | None = None
        self._silences = 0
        self._epochs: deque[int] = deque(maxlen=PAST_EPOCHS)
        self._blocklist: BlocklistFetch | None = None

    def is_past(self, epoch: int) -> bool:
        """Tell whether an epoch is one that ended."""
        return epoch in self._epochs

    def heard(self, epoch: int, version: int, keepalive: float, now: float) -> None:
        """Take what a message says of the directory; pull soon if there is something new."""
        old = self.sync.seen_epoch
        if epoch != old:
            self.stop()
            if old:
                self._epochs.append(old)
        self.sync.heard(epoch, version)
        if self.sync.behind and self._request is None and self.due is None:
            self.due = now + self._uniform() * min(SPREAD, keepalive / 40)

    def begin(self, now: float) -> None:
        """Pull, if that is still needed."""
        self.due = None
        if self.sync.behind and self._request is None:
            self.sync.begin()
            self._next(now)

    def stop(self) -> None:
        """End what goes on; the next news begins it anew."""
        self._end()
        self.due = None
        self._blocklist = None

    def fetch_blocklist(self, held: int, now: float) -> None:
        """Ask for a blocklist of a higher serial than `held`, unless one is on its way."""
        if self._blocklist is None:
            self._blocklist = BlocklistFetch(held)
            self._ask_parts(now)

    def on_page(self, request: Request, page: m.Page, keepalive: float, now: float) -> None:
        """Take a page that answers `request`."""
        if request is not self._request or page.epoch != self.sync.seen_epoch:
            self._channel.dropped["other-epoch"] += 1
            return
        self._silences = 0
        if page.items or page.gone:
            self._emit(RecordsArrived(self._server, page.items, page.gone))
        ended = self.sync.take(page)
        if ended is None:
            # More is on its way; what was lost, or held back, is asked for when nothing came for a while.
            request.due = now + self._channel.round_trip.timeout()
        elif ended:
            self._end()
            self._emit(Synced(self._server, self.sync.epoch, self.sync.version))
            self.heard(self.sync.seen_epoch, self.sync.seen_version, keepalive, now)
        else:
            self._next(now)

    def on_part(self, request: Request, part: m.BlocklistPart, now: float) -> None:
        """Take a part of a blocklist."""
        fetch = self._blocklist
        if fetch is None or fetch is not request.context:
            return
        if not fetch.take(part):
            self._blocklist = None  # nothing newer, or another list by now
        elif (encoded := fetch.whole()) is not None:
            self._blocklist = None
            self._emit(BlocklistArrived(self._server, encoded))
        else:
            self._ask_parts(now)

    def on_silence(self, request: Request, now: float) -> bool:
        """Take that nothing (more) came in answer to `request`; return whether it was ours to deal with."""
        if request is not self._request:
            return False
        self._silences += 1
        if self._silences < SILENCES:
            self._next(now)  # a question of its own: late pages of the one before must not mix in
        else:
            self._put_off(now)
        return True

    def on_failure(self, request: Request, code: str, now: float) -> bool:
        """Take that `request` was refused or timed out; return whether it was ours."""
        if request is self._request:
            if code == "digests-needed":
                self.sync.begin_digests()
                self._next(now)
            else:
                self._put_off(now)
            return True
        if isinstance(request.context, BlocklistFetch):
            if request.context is self._blocklist:
                self._blocklist = None
            return True
        return False

    def _next(self, now: float) -> None:
        self._end()
        self._request = self._channel.ask(
            m.Pull,
            self.sync.request,
            m.Page,
            now,
            tries=1,
            interval=lambda _: self._channel.round_trip.timeout(self._silences + 1),
        )
        if self._request is None:
            self._put_off(now)

    def _end(self) -> None:
        self._channel.requests.close(self._request)
        self._request = None

    def _put_off(self, now: float) -> None:
        self._end()
        self._silences = 0
        self.due = now + LATER

    def _ask_parts(self, now: float) -> None:
        fetch = self._blocklist
        while fetch is not None and (offset := fetch.next_offset()) is not None:
            question = fetch.question(offset)
            if not self._channel.ask(
                m.GetBlocklist, question, m.BlocklistPart, now, tries=TRIES, context=fetch
            ):
                self._blocklist = None
                return
