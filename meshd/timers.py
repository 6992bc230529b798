"""The timer rules of a session, each named by its cause, and the table that all its timers live in.

The rules are those of the paper, 6.2 to 6.5. A rule only sets and cancels timers; what happens when one is
due is the session's business.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, auto

from crossedge.meshd.constants import (
    KEEPALIVE_TIMEOUT,
    MESH_RETRY_JITTER,
    MESH_RETRY_TIMES,
    MESH_RIVAL_TIME,
    NEW_HANDSHAKE_TIME,
    REJECT_AFTER_TIME,
    REKEY_TIMEOUT,
    REKEY_TIMEOUT_JITTER,
    ZERO_KEYS_TIME,
)


class Timer(IntEnum):  # numbers: their hash is not computed in Python
    """What a session may be waiting for."""

    RETRY = auto()  # our initiation was not answered
    NEW_HANDSHAKE = auto()  # we sent data and heard nothing
    KEEPALIVE = auto()  # we received data and had nothing to send
    PERSISTENT = auto()  # the mapping on the way must be kept open
    EXPIRE = auto()  # the current keypair is too old to be used
    ZERO_KEYS = auto()  # no new keys came: erase the old ones


class Timers:
    """When each timer of one session is due, in seconds of the caller's `now`."""

    __slots__ = (
        "_due",
        "_mesh",
        "_random",
        "_reply_jitter",
        "another_keepalive",
        "persistent_keepalive",
        "tries",
    )

    def __init__(self, random: Callable[[int], bytes], *, mesh: bool) -> None:
        """Take randomness for jitter; `mesh` retries handshakes as two meshds do."""
        self._due: dict[Timer, float] = {}
        self._random = random
        self._mesh = mesh
        self._reply_jitter = 0.0  # seconds, drawn anew for each keypair
        self.persistent_keepalive = 0.0  # seconds, 0: off
        self.another_keepalive = False
        self.tries = 0  # initiations sent in the handshake that is going on

    # --- The table -------------------------------------------------------------------------------------

    def pending(self, timer: Timer) -> bool:
        """Tell whether a timer is set."""
        return timer in self._due

    def next_deadline(self) -> float | None:
        """Return when the next timer is due, or None."""
        return min(self._due.values(), default=None)

    def pop_due(self, now: float) -> list[Timer]:
        """Return the timers that are due, earliest first, and forget them."""
        due = sorted((when, timer.value, timer) for timer, when in self._due.items() if when <= now)
        for _, _, timer in due:
            del self._due[timer]
        return [timer for _, _, timer in due]

    def clear(self) -> None:
        """Cancel everything."""
        self._due.clear()
        self.another_keepalive = False
        self.tries = 0

    # --- The rules -------------------------------------------------------------------------------------

    def on_sent(self, now: float, size: int = 0) -> None:
        """An authenticated message of any kind went out: it is as good as a keepalive.

        With `size` bytes of data in it, something must come back within 15 s (paper, 6.5).
        """
        due = self._due
        due.pop(Timer.KEEPALIVE, None)
        if self.persistent_keepalive > 0:
            due[Timer.PERSISTENT] = now + self.persistent_keepalive
        if size and Timer.NEW_HANDSHAKE not in due:
            due[Timer.NEW_HANDSHAKE] = now + NEW_HANDSHAKE_TIME + self._reply_jitter

    def on_received(self, now: float, size: int = 0) -> None:
        """An authenticated message of any kind came in: the peer is there.

        With `size` bytes of data in it, something must go back within 10 s, if only a keepalive (paper, 6.5).
        """
        due = self._due
        due.pop(Timer.NEW_HANDSHAKE, None)
        if self.persistent_keepalive > 0:
            due[Timer.PERSISTENT] = now + self.persistent_keepalive
        if not size:
            return
        if Timer.KEEPALIVE in due:
            self.another_keepalive = True
        else:
            due[Timer.KEEPALIVE] = now + KEEPALIVE_TIMEOUT

    def on_keepalive_due(self, now: float) -> None:
        """The keepalive timer ran out; data that came while it ran gets a keepalive of its own."""
        if self.another_keepalive:
            self.another_keepalive = False
            self._due[Timer.KEEPALIVE] = now + KEEPALIVE_TIMEOUT

    def on_persistent_due(self, now: float) -> None:
        """The persistent keepalive is due, and again after its interval whatever becomes of this one."""
        if self.persistent_keepalive > 0:
            self._due[Timer.PERSISTENT] = now + self.persistent_keepalive

    def on_initiation_sent(self, now: float) -> None:
        """An initiation went out: try again if no response comes (paper, 6.4)."""
        if self._mesh:
            wait = MESH_RETRY_TIMES[min(self.tries, len(MESH_RETRY_TIMES) - 1)]
            wait += self._jitter(wait * MESH_RETRY_JITTER)
        else:
            wait = REKEY_TIMEOUT + self._jitter(REKEY_TIMEOUT_JITTER)
        self.tries += 1
        self._due[Timer.RETRY] = now + wait

    def on_rival_answered(self, now: float) -> None:
        """We answered the peer's initiation while ours waits: let its handshake end before we retry."""
        if Timer.RETRY in self._due:
            self._due[Timer.RETRY] = max(self._due[Timer.RETRY], now + MESH_RIVAL_TIME)

    def on_handshake_complete(self) -> None:
        """Both sides are known to have the new keys."""
        self._due.pop(Timer.RETRY, None)
        self.tries = 0

    def on_given_up(self, now: float) -> None:
        """The handshake was tried for long enough: erase in time what it left (paper, 6.4)."""
        self._due.pop(Timer.KEEPALIVE, None)
        self.tries = 0
        self._due.setdefault(Timer.ZERO_KEYS, now + ZERO_KEYS_TIME)

    def on_keys_derived(self, now: float) -> None:
        """New keys exist: they put off the day when all keys are erased (paper, 6.3)."""
        self._due[Timer.ZERO_KEYS] = now + ZERO_KEYS_TIME

    def on_current_changed(self, created: float) -> None:
        """Another keypair is in use; it may be until it is 180 s old (paper, 6.2)."""
        self._due[Timer.EXPIRE] = created + REJECT_AFTER_TIME
        self._reply_jitter = self._jitter(REKEY_TIMEOUT_JITTER)

    def on_persistent_keepalive_set(self, now: float) -> None:
        """The interval was changed: the first keepalive goes out now."""
        if self.persistent_keepalive > 0:
            self._due[Timer.PERSISTENT] = now
        else:
            self._due.pop(Timer.PERSISTENT, None)

    def _jitter(self, most: float) -> float:
        return int.from_bytes(self._random(2), "big") / 65536 * most
