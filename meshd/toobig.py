"""Answering a local sender whose packet has no room on its way, within a rate."""

from __future__ import annotations

from collections import Counter
from typing import Final

from crossedge.meshd.icmp import too_big
from crossedge.meshd.packet import dissect, outline
from crossedge.meshd.sink import Sink
from crossedge.meshd.virtio import GSO_NONE, SIZE, Header

IPV6_LEAST: Final = 1280  # bytes: no IPv6 host believes in a shorter path (RFC 8200, 5)
ANSWER_RATE: Final = 100.0  # answers per second
ANSWER_BURST: Final = 50.0


class TooBigAnswers:
    """Writes "too big" to the TUN."""

    __slots__ = ("_at", "_dropped", "_sink", "_tokens")

    def __init__(self, sink: Sink, dropped: Counter[str]) -> None:
        self._sink = sink
        self._dropped = dropped
        self._at = float("-inf")
        self._tokens = ANSWER_BURST

    def answer(self, packet: memoryview, mtu: int, now: float) -> None:
        """Tell the sender of a packet, which is dropped, how long it may be, in bytes."""
        self._dropped["outbound-too-big"] += 1
        self._tokens = min(ANSWER_BURST, self._tokens + (now - self._at) * ANSWER_RATE)
        self._at = now
        if self._tokens < 1.0:
            self._dropped["too-big-answer-rate"] += 1
            return
        if packet[0] >> 4 == 6:
            mtu = max(mtu, IPV6_LEAST)  # a host ignores less
        answer = too_big(packet, outline(packet), mtu)
        if answer is not None:
            self._tokens -= 1.0
            frame = memoryview(bytearray(bytes(SIZE) + answer))
            self._sink.write(frame, Header(0, GSO_NONE, 0, 0, 0, 0), dissect(answer))
