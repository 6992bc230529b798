"""Putting records of several datagrams together again, from chunks that nobody has authenticated yet.

A candidate is known by (receiver, counter, count, chunk size, source). Chunks come only from the endpoints
that the session uses or heard the peer from, which the caller checks. A forged chunk can therefore do no more
than claim a place: where two chunks claim the same, the record gets a second candidate that keeps the later
of each, while the first keeps the earlier; whichever opens is the record. There are never more than two
candidates, the first and the latest. A failed open consumes no counter. What waits is bounded in bytes and
time, per session and in all.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Final

from crossedge.wire.endpoint import Endpoint

SESSION_BYTES: Final = 256 * 1024
TOTAL_BYTES: Final = 4 * 1024 * 1024
LIFETIME: Final = 1.0  # seconds from a record's first chunk
SMALLEST_CHUNK: Final = 64  # bytes; no sender cuts finer
RECORD_COST: Final = 1024  # bytes that a record is charged besides its chunks
CHUNK_COST: Final = 64  # and each chunk besides its own

Record = tuple[int, int]
"""Receiver index and counter."""


class Candidate:
    """One way in which the chunks of a record may belong together."""

    __slots__ = ("filled", "key", "parts")

    def __init__(self, key: tuple[int, int, Endpoint], parts: list[bytes]) -> None:
        """Take the key (count, chunk size, source) and a list of chunks, empty where one is missing."""
        self.key = key
        self.parts = parts
        self.filled = sum(map(bool, parts))

    def put(self, index: int, part: bytes) -> None:
        """Put a chunk in its place, over what is there."""
        self.filled += not self.parts[index]
        self.parts[index] = part

    def cost(self) -> int:
        """Return the bytes that it is charged."""
        return self.filled * (self.key[1] + CHUNK_COST)


class _Waiting:
    __slots__ = ("candidates", "cost", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.cost = 0
        self.candidates: list[Candidate] = []


class _Session:
    __slots__ = ("cost", "records")

    def __init__(self) -> None:
        self.cost = 0
        self.records: OrderedDict[int, _Waiting] = OrderedDict()


class Reassembly:
    """The records of all sessions that wait for chunks."""

    __slots__ = ("_cost", "_dropped", "_sessions", "records")

    def __init__(self, dropped: Counter[str]) -> None:
        self._dropped = dropped
        self._sessions: dict[int, _Session] = {}
        self.records: OrderedDict[Record, _Waiting] = OrderedDict()
        """What waits, oldest first; for those who ask whether anything does."""
        self._cost = 0

    def __len__(self) -> int:
        return len(self.records)

    @property
    def cost(self) -> int:
        """Bytes charged for all that waits."""
        return self._cost

    def add(
        self, record: Record, index: int, count: int, part: bytes, source: Endpoint, now: float
    ) -> list[bytes]:
        """Take chunk `index` of `count`; returns the ciphertexts that it completed: none, one or two.

        The caller tries to open them and calls `discard` once one did.
        """
        if not 0 <= index < count or len(part) < SMALLEST_CHUNK:
            self._dropped["chunk-malformed"] += 1
            return []
        waiting = self.records.get(record) or self._begin(record, now)
        key = (count, len(part), source)
        touched = self._place(waiting.candidates, key, index, part)
        self._charge(record[0], waiting)
        complete = [b"".join(candidate.parts) for candidate in touched if candidate.filled == count]
        if not complete:
            self._make_room(record[0], now)
        return complete

    def add_run(
        self, record: Record, index: int, count: int, parts: Sequence[bytes], source: Endpoint, now: float
    ) -> list[bytes]:
        """Take equally long chunks from `index` on, as `add` would, in one step where none is there."""
        end, size = index + len(parts), len(parts[0])
        if end > count or size < SMALLEST_CHUNK:
            self._dropped["chunk-malformed"] += len(parts)
            return []
        waiting = self.records.get(record) or self._begin(record, now)
        key = (count, size, source)
        candidates = waiting.candidates
        if not candidates:
            candidates.append(Candidate(key, [b""] * count))
        only = candidates[0]
        if len(candidates) > 1 or only.key != key or any(only.parts[index:end]):
            complete: list[bytes] = []
            for place, part in enumerate(parts, index):
                complete += self.add(record, place, count, part, source, now)
            return complete
        only.parts[index:end] = parts
        only.filled += len(parts)
        self._charge(record[0], waiting)
        if only.filled == count:
            return [b"".join(only.parts)]
        self._make_room(record[0], now)
        return []

    def discard(self, record: Record) -> None:
        """Forget a record: it was opened, or it is a replay."""
        waiting = self.records.pop(record, None)
        if waiting is None:
            return
        receiver, counter = record
        session = self._sessions[receiver]
        del session.records[counter]
        session.cost -= waiting.cost
        self._cost -= waiting.cost
        if not session.records:
            del self._sessions[receiver]

    def expire(self, now: float) -> None:
        """Drop what has waited too long."""
        while self.records:
            record, waiting = next(iter(self.records.items()))
            if now - waiting.since < LIFETIME:
                return
            self._dropped["chunk-timeout"] += 1
            self.discard(record)

    def _begin(self, record: Record, now: float) -> _Waiting:
        receiver, counter = record
        waiting = self.records[record] = _Waiting(now)
        self._sessions.setdefault(receiver, _Session()).records[counter] = waiting
        return waiting

    def _place(
        self, candidates: list[Candidate], key: tuple[int, int, Endpoint], index: int, part: bytes
    ) -> list[Candidate]:
        """Put a chunk where it belongs; returns the candidates that changed."""
        alike = [candidate for candidate in candidates if candidate.key == key]
        if any(candidate.parts[index] == part for candidate in alike):
            self._dropped["chunk-duplicate"] += 1
            return []
        if alike and not alike[0].parts[index]:
            for candidate in alike:
                candidate.put(index, part)
            return alike
        if len(alike) == 2:
            self._dropped["chunk-conflict"] += 1
            alike[1].put(index, part)
            return alike[1:]
        if alike or len(candidates) == 2:
            self._dropped["chunk-conflict"] += 1
        latest = Candidate(key, list(alike[0].parts) if alike else [b""] * key[0])
        latest.put(index, part)
        candidates[:] = [*(alike[:1] or candidates[:1]), latest]
        return [latest]

    def _charge(self, receiver: int, waiting: _Waiting) -> None:
        cost = RECORD_COST + sum(candidate.cost() for candidate in waiting.candidates)
        self._sessions[receiver].cost += cost - waiting.cost
        self._cost += cost - waiting.cost
        waiting.cost = cost

    def _make_room(self, receiver: int, now: float) -> None:
        self.expire(now)
        while receiver in self._sessions and self._sessions[receiver].cost > SESSION_BYTES:
            self._dropped["chunk-session-full"] += 1
            self.discard((receiver, next(iter(self._sessions[receiver].records))))
        while self._cost > TOTAL_BYTES:
            self._dropped["chunk-full"] += 1
            self.discard(next(iter(self.records)))
