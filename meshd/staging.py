"""What a drain of the TUN has for each link until it is sealed: small packets share datagrams and trains."""

from __future__ import annotations

from collections import Counter
from typing import Final

from crossedge.meshd.keypair import CounterExhaustedError, Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.sink import LARGEST_PACKET
from crossedge.meshd.superframe import FRAME_SIZE, SuperframeSealer
from crossedge.meshd.train import Train, Transmit
from crossedge.meshd.transport import TransportSealer

STAGED_BYTES: Final = FRAME_SIZE + LARGEST_PACKET  # per link; what is more is not kept for the drain's end
SPARE_STAGES: Final = 64


class Stage:
    """What one drain has for one link: frames one after the other, and under which keypair they leave."""

    __slots__ = ("ends", "keypair", "sealed", "superframes", "used", "view")

    def __init__(self, keypair: Keypair) -> None:
        self.view = memoryview(bytearray(STAGED_BYTES))
        self.used = 0
        self.ends: list[int] = []
        self.keypair = keypair
        self.superframes = False
        self.sealed = 0


class Staging:
    """The stages of all links, what seals them, and the train in which they leave."""

    __slots__ = ("_dropped", "_spare", "_train", "frames", "packets", "stages")

    def __init__(self, transmit: Transmit, dropped: Counter[str]) -> None:
        self._dropped = dropped
        self._train = Train(transmit)
        self.frames = SuperframeSealer(self._train)
        self.packets = TransportSealer(self._train)
        self.stages: dict[Link, Stage] = {}
        """Of the drain that goes on."""
        self._spare: list[Stage] = []

    def open(self, link: Link, now: float) -> Stage | None:
        """Return a stage for a link that can send, else None."""
        keypair = link.session.current
        if keypair is None or not link.endpoints or not keypair.can_send(now):
            return None
        stage = self._spare.pop() if self._spare else Stage(keypair)
        stage.keypair = keypair
        stage.superframes = link.agreed is keypair and keypair.chunks_send is not None
        stage.sealed = 0
        self.stages[link] = stage
        return stage

    def add(self, link: Link, stage: Stage, frame: memoryview) -> None:
        """Take a frame whose frame header is written."""
        after = stage.used + len(frame)
        if after > STAGED_BYTES:
            self.seal(link, stage)
            after = len(frame)
        stage.view[stage.used : after] = frame
        stage.used = after
        stage.ends.append(after)

    def seal(self, link: Link, stage: Stage) -> None:
        """Seal what is staged for a link into the train."""
        try:
            if stage.superframes:
                refused = self.frames.frames(link, stage.keypair, stage.view[: stage.used], stage.ends)
                if refused:
                    self._dropped["outbound-too-big"] += refused
            else:
                start = 0
                for end in stage.ends:
                    self.packets.packet(link, stage.keypair, stage.view[start + FRAME_SIZE : end])
                    start = end
        except CounterExhaustedError:
            self._dropped["counter-exhausted"] += len(stage.ends)
        stage.sealed += stage.used
        stage.used = 0
        stage.ends.clear()

    def flush(self, now: float) -> None:
        """Seal and send what was staged, and tell the sessions."""
        for link, stage in self.stages.items():
            if stage.ends:
                self.seal(link, stage)
        self._train.send()
        for link, stage in self.stages.items():
            if stage.sealed:
                link.sent.size += stage.sealed
                link.sent.at = now
                link.session.data_sent(now, stage.sealed)
            if len(self._spare) < SPARE_STAGES:
                self._spare.append(stage)
        self.stages.clear()
