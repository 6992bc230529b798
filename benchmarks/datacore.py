"""What the data path's core costs in memory, without kernel and wire: `python benchmarks/datacore.py`.

Each row is one drain of the TUN, sealed and opened again: microseconds to send it; to take it where it comes
as trains (GRO), which are taken apart while they are read where each is one record; and where it arrives as
single datagrams. What is one packet goes as what comes alone. The least of many runs is shown, so that other
load on the machine matters little. `grown` is with records as long as growth lets them be.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import data_pair as lab  # two data paths joined in memory, and packets to feed them

from crossedge.meshd.inbound import Arrival
from crossedge.meshd.superframe import HEADER_SIZE

GROUPS, RUNS = 200, 5  # short ones: some are not interrupted
SLOT = 524_288  # bytes between what is received at a time: always in the same places
NOISE = random.Random(1).randbytes(61_000)  # sums of zeros would cost too little
LONG = NOISE * 6 + NOISE[:8_496]
BIG_TCP = lab.ALL_OFFLOADS._replace(big_tcp=True)
CASES = {
    "TCP super-packet, 61,000 B": ([lab.super_frame(lab.tcp(NOISE, partial=True), 1328)], {}),
    "the same, ChaCha20": (
        [lab.super_frame(lab.tcp(NOISE, partial=True), 1328)],
        {"aead": "chacha20-poly1305"},
    ),
    "TCP super-packet, 374,496 B": ([lab.big_super_frame(LONG, 1328)], {"offloads": BIG_TCP}),
    "64 UDP packets, 1,300 B": (
        [lab.partial_frame(lab.udp(bytes(1300), partial=True, identification=n)) for n in range(64)],
        {},
    ),
    "64 UDP packets, 64 B": (
        [lab.partial_frame(lab.udp(bytes(64), partial=True, identification=n)) for n in range(64)],
        {},
    ),
    "one TCP ACK": ([lab.plain(lab.tcp(b""))], {}),
    "TCP super-packet, stock peer": (
        [lab.super_frame(lab.tcp(NOISE[:60_904], partial=True), 1324)],
        {"stock": True, "superframes": False},
    ),
}


def least(call: Callable[[], object]) -> float:
    """Return the microseconds of one call, in the best of several groups."""
    best = float("inf")
    for _ in range(GROUPS):
        began = time.perf_counter()
        for _ in range(RUNS):
            call()
        best = min(best, (time.perf_counter() - began) / RUNS)
    return best * 1e6


def cost(frames: list[bytes], growth: int, settings: dict[str, object]) -> tuple[float, float, float]:
    """Return what sending, taking trains and taking single datagrams cost, in microseconds."""
    alice, bob = lab.pair(size=1472, **settings)
    alice.link.growth.datagrams = growth
    bob.plane._sink._write, bob.plane._sink._join = lambda _: None, lambda _: True

    alone = len(frames) == 1 and len(frames[0]) < 1400

    def send() -> None:
        alice.sent.clear()
        if alone:
            alice.read_lone(frames[0])
        else:
            alice.read(*frames)

    def copy() -> None:
        for frame in frames:
            alice.plane.buffer[: len(frame)] = frame

    sending = least(send) - least(copy)

    slots = bytearray(RUNS * SLOT)

    def batches(apart: bool) -> Iterator[tuple[bytearray, list[Arrival]]]:
        for number in itertools.count():
            send()
            arrivals = []
            buffer, start = (bytearray(SLOT), 0) if alone else (slots, number % RUNS * SLOT)
            for _, train, segment in alice.sent:
                heads = b""
                if growth > 1 and not apart and train[3] * segment == len(train):
                    datagrams = [train[at : at + segment] for at in range(0, len(train), segment)]
                    heads = b"".join(each[:HEADER_SIZE] for each in datagrams[1:])
                    train = datagrams[0] + b"".join(each[HEADER_SIZE:] for each in datagrams[1:])
                end = start + len(train)
                buffer[start:end] = train
                stride, aside = segment if apart else 0, memoryview(heads) if heads else None
                step = (
                    segment if apart and "stock" in settings else end - start
                )  # those have slots of their own
                for at in range(start, end, step):
                    after = min(at + step, end)
                    arrivals.append(Arrival(at, after, segment, lab.ALICE, lab.NOW, stride, aside))
                start = end + len(heads)
            yield buffer, arrivals

    taking = []
    for apart in (False, True):
        made = batches(apart)
        best = float("inf")
        for _ in range(GROUPS):
            waiting = [next(made) for _ in range(RUNS)]
            began = time.perf_counter()
            for buffer, arrivals in waiting:
                if not (alone and bob.plane.inbound_lone(buffer, arrivals[0].end, lab.ALICE, lab.NOW)):
                    bob.plane.inbound(buffer, arrivals, lab.NOW)
            best = min(best, (time.perf_counter() - began) / RUNS)
        taking.append(best * 1e6)
    if bob.dropped:
        raise RuntimeError(f"dropped: {bob.dropped}")
    return sending, taking[0], taking[1]


def main() -> None:
    """Print the table."""
    print(f"{'us':<40}{'send':>9}{'take':>9}{'singles':>9}")
    for name, (frames, settings) in CASES.items():
        for growth in (1, 64) if "superframes" not in settings and len(frames[0]) > 500 else (1,):
            figures = cost(frames, growth, settings)
            label = f"{name}{', grown' if growth > 1 else ''}"
            print(f"{label:<40}" + "".join(f"{figure:9.1f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
