"""The lease checkpoint: whom a restarted server tells that it restarted.

It is a hint and never authority: an entry leads to one small sealed `Notify` (and one more, for loss) to an
endpoint that had a lease, and to nothing else. A node that sees the new epoch registers again at once.

The file is one msgpack map: "v" 1, "l" an array of [packed endpoint, packed local endpoint, control key].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]  # ships no types

from crossedge.wire.endpoint import UdpEndpoint, pack_endpoint, unpack_endpoint
from crossedge.wire.errors import WireError

FORMAT = 1
MAX_HINTS = 1 << 20
"""Leases in one checkpoint."""
HINT_BATCH = 10
HINT_INTERVAL = 0.02
"""Seconds between batches: 500 nodes a second are told."""
HINT_AGAIN = 1.5
"""Seconds after which those that did not register are told once more."""


class Hint(NamedTuple):
    """A node that had a lease before the restart."""

    endpoint: UdpEndpoint
    local: UdpEndpoint
    """Where we were bound then."""
    control_key: bytes


def encode_checkpoint(hints: Iterable[Hint]) -> bytes:
    """Return the content of a checkpoint file."""
    leases = [[pack_endpoint(hint.endpoint), pack_endpoint(hint.local), hint.control_key] for hint in hints]
    packed: bytes = msgpack.packb({"v": FORMAT, "l": leases})
    return packed


def decode_checkpoint(content: bytes) -> list[Hint]:
    """Return the hints in a checkpoint file; `WireError` where it is damaged or of another format."""
    try:
        values: Any = msgpack.unpackb(content, raw=False, strict_map_key=True, max_array_len=MAX_HINTS)
        if values["v"] != FORMAT:
            raise WireError("checkpoint-format")
        hints = [
            Hint(unpack_endpoint(endpoint), unpack_endpoint(local), control_key)
            for endpoint, local, control_key in values["l"]
        ]
    except WireError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise WireError("malformed", f"checkpoint ({type(error).__name__})") from None
    if any(type(hint.control_key) is not bytes or len(hint.control_key) != 32 for hint in hints):
        raise WireError("malformed", "checkpoint (control key)")
    return hints


class Hints:
    """Hands the hints out, paced, and those that did not answer once more."""

    def __init__(self) -> None:
        self._waiting: list[Hint] = []
        self._again: list[Hint] = []
        self._due: float | None = None
        self._second = 0.0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._again)

    def start(self, hints: Iterable[Hint], now: float) -> None:
        """Begin to tell the nodes of a checkpoint."""
        self._waiting = list(hints)[::-1]
        self._again = []
        self._second = now + HINT_AGAIN
        self._due = now if self._waiting else None

    def next_deadline(self) -> float | None:
        """Return when `take` has something."""
        return self._due

    def take(self, now: float, is_back: Callable[[bytes], bool]) -> list[Hint]:
        """Return the hints that are due now; `is_back(control key)` tells who has registered since."""
        if self._due is None or now < self._due:
            return []
        batch: list[Hint] = []
        while self._waiting and len(batch) < HINT_BATCH:
            hint = self._waiting.pop()
            if not is_back(hint.control_key):
                batch.append(hint)
        if self._second:
            self._again += batch
        if self._waiting:
            self._due = now + HINT_INTERVAL
        elif self._again:
            self._waiting, self._again = self._again[::-1], []
            self._due = max(self._second, now + HINT_INTERVAL)
            self._second = 0.0
        else:
            self._due = None
        return batch
