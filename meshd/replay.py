"""Which counters a receiver has already accepted: the sliding window of RFC 6479.

The window is a ring of 64-bit words, and its newest word moves by whole words, so that nothing is ever
shifted. Two steps keep a forger out: `check` before a datagram is opened, `commit` after it was opened; a
failed open therefore consumes no counter. Both exist for a run of consecutive counters too, because the
datagrams of one train arrive together.
"""

from __future__ import annotations

from crossedge.meshd.constants import REJECT_AFTER_MESSAGES, REPLAY_WINDOW, REPLAY_WORD, REPLAY_WORDS

_SHIFT = REPLAY_WORD.bit_length() - 1
_LOW = REPLAY_WORD - 1
_RING = REPLAY_WORDS - 1
_FULL = (1 << REPLAY_WORD) - 1
_CLOSED = 1 << 80  # newer than any counter by more than the window


class ReplayWindow:
    """The counters of one direction of one keypair that were accepted.

    Bitmasks speak of a run of counters: bit i stands for counter `first + i`.
    """

    __slots__ = ("_words", "newest")

    def __init__(self) -> None:
        self.newest = 0
        """The greatest counter accepted so far (0 also when there is none yet)."""
        self._words = [0] * REPLAY_WORDS

    def close(self) -> None:
        """Refuse every counter from now on; for a keypair that was erased."""
        self.newest = _CLOSED
        self._words = [_FULL] * REPLAY_WORDS

    def check(self, counter: int) -> bool:
        """Tell whether `counter` is new and not too old. Changes nothing."""
        newest = self.newest
        if counter > newest:
            return counter < REJECT_AFTER_MESSAGES
        if newest - counter > REPLAY_WINDOW:
            return False
        return not self._words[counter >> _SHIFT & _RING] >> (counter & _LOW) & 1

    def commit(self, counter: int) -> bool:
        """Mark `counter` as accepted, after its datagram was opened; False where it was not acceptable."""
        if not self.check(counter):
            return False
        self.mark(counter)
        return True

    def mark(self, counter: int) -> None:
        """Mark `counter` as accepted, which `check` found acceptable just now."""
        word, newest = counter >> _SHIFT, self.newest
        if counter > newest:
            if word - (newest >> _SHIFT) == 1:  # as with records of many datagrams
                self.newest = counter
                self._words[word & _RING] = 1 << (counter & _LOW)
                return
            if word == newest >> _SHIFT:
                self.newest = counter
            else:
                self._advance(counter)
        self._words[word & _RING] |= 1 << (counter & _LOW)

    def check_range(self, first: int, count: int) -> int:
        """Return the bitmask of those of `count` counters from `first` that may be accepted."""
        newest = self.newest
        end = first + count
        if first > newest:
            if end <= REJECT_AFTER_MESSAGES:
                return (1 << count) - 1
            return (1 << max(0, REJECT_AFTER_MESSAGES - first)) - 1
        fresh = (1 << count) - 1
        oldest = newest - REPLAY_WINDOW
        if first < oldest:
            if end <= oldest:
                return 0
            fresh = fresh >> (oldest - first) << (oldest - first)
        if end > REJECT_AFTER_MESSAGES:
            fresh &= (1 << max(0, REJECT_AFTER_MESSAGES - first)) - 1
        words = self._words
        for word in range(max(first, oldest, 0) >> _SHIFT, (min(end - 1, newest) >> _SHIFT) + 1):
            offset = (word << _SHIFT) - first
            seen = words[word & _RING]
            fresh &= ~(seen << offset if offset >= 0 else seen >> -offset)
        return fresh

    def commit_range(self, first: int, count: int, mask: int = -1) -> int:
        """Mark those counters of the run that `mask` names as accepted.

        Returns the bitmask of those that were acceptable until now; the others are replays, no more.
        """
        fresh = self.check_range(first, count) & mask
        if not fresh:
            return 0
        newest = first + fresh.bit_length() - 1
        if newest > self.newest:
            self._advance(newest)
        words = self._words
        word = first >> _SHIFT
        rest = fresh << (first & _LOW)
        while rest:
            words[word & _RING] |= rest & _FULL
            rest >>= REPLAY_WORD
            word += 1
        return fresh

    def _advance(self, counter: int) -> None:
        """Make `counter` the newest; the words that the window enters anew are emptied."""
        word = self.newest >> _SHIFT
        steps = (counter >> _SHIFT) - word
        self.newest = counter
        if steps >= REPLAY_WORDS:
            self._words = [0] * REPLAY_WORDS
            return
        words = self._words
        for entered in range(word + 1, word + steps + 1):
            words[entered & _RING] = 0
