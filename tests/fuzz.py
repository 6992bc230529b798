"""Try every decoder of untrusted bytes with bytes that nobody made: `make fuzz`.

python tests/fuzz.py [--seconds 60] [--seed N] [--only NAME]

Only a refusal may come out of a decoder, within a bound of processor time and memory. Hypothesis draws what
is changed where, shrinks what fails, and the seed that is printed does the same again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from random import Random

sys.path.append(
    str(Path(__file__).resolve().parent.parent)
)  # our `sched` must not hide the standard library's

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz_entries import ENTRIES, Entry
from tests.fuzz_inputs import mutated

CPU_LIMIT = 1.0
"""Seconds of processor time that any bytes may cost; the slowest take some hundredths."""
MEMORY_LIMIT = 4 << 20
"""Bytes that a decoder may have taken at once."""
LARGEST = 65_536
"""Bytes of the longest input: no datagram and no request is longer."""


class Worst:
    """What the most expensive input of an entry cost."""

    def __init__(self) -> None:
        self.inputs = 0
        self.cpu = 0.0
        self.memory = 0


def inputs(entry: Entry) -> st.SearchStrategy[bytes]:
    """Return the bytes to try an entry with: random ones, seeds, and seeds with changes."""
    seeds = st.sampled_from(entry.seeds())
    return st.one_of(
        st.binary(max_size=1500),
        seeds,
        st.builds(mutated, seeds, seeds, st.integers(0, 2**32).map(Random)).map(lambda made: made[:LARGEST]),
    )


def attempt(entry: Entry, data: bytes, worst: Worst) -> None:
    """Hand bytes to an entry; `AssertionError` where that takes too long or too much memory."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    began = time.process_time()
    with suppress(*entry.refusal):
        entry.run(data)
    cpu = time.process_time() - began
    memory = tracemalloc.get_traced_memory()[1] - before
    worst.inputs += 1
    worst.cpu, worst.memory = max(worst.cpu, cpu), max(worst.memory, memory)
    assert cpu <= CPU_LIMIT, f"{cpu:.2f} s of processor time for {len(data)} bytes"
    assert memory <= MEMORY_LIMIT, f"{memory:,} bytes of memory for {len(data)} bytes"


def fuzz(name: str, examples: int, number: int | None = None) -> Worst:
    """Try one entry with so many inputs: the same ones each time, or those of a seed."""
    entry, worst = ENTRIES[name], Worst()
    with suppress(*entry.refusal):
        entry.run(b"")  # what is made once is made now, and not measured

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=number is None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(inputs(entry))
    def run(data: bytes) -> None:
        attempt(entry, data, worst)

    if number is not None:
        run = seed(number)(run)
    already = tracemalloc.is_tracing()
    if not already:
        tracemalloc.start()
    try:
        run()
    finally:
        if not already:
            tracemalloc.stop()
    return worst


def main() -> None:
    """Go round all entries until the time is over; exit status 1 and what to do again where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)), help="as it was printed")
    parser.add_argument("--only", choices=sorted(ENTRIES), help="one entry")
    parser.add_argument("--examples", type=int, default=60, help="inputs of each entry in one round (60)")
    options = parser.parse_args()
    print(f"--seed {options.seed}", flush=True)
    names = [options.only] if options.only else list(ENTRIES)
    total = {name: Worst() for name in names}
    end = time.monotonic() + options.seconds
    rounds = 0
    tracemalloc.start()
    while not rounds or time.monotonic() < end:
        for name in names:
            if rounds and time.monotonic() >= end:
                break
            try:
                found = fuzz(name, options.examples, options.seed + rounds)
            except BaseException:
                same = f"--seed {options.seed + rounds} --examples {options.examples}"
                print(f"{name} FAILED; again: {same} --only {name!r} --seconds 0", file=sys.stderr)
                raise
            worst = total[name]
            worst.inputs += found.inputs
            worst.cpu, worst.memory = max(worst.cpu, found.cpu), max(worst.memory, found.memory)
        rounds += 1
    for name, worst in total.items():
        cost = f"at most {worst.cpu * 1e3:6.1f} ms, {worst.memory:>9,} bytes"
        print(f"{name:<36} {worst.inputs:>7,} inputs, {cost}")
    tried = sum(worst.inputs for worst in total.values())
    print(f"{tried:,} inputs to {len(names)} decoders: only refusals came out")


if __name__ == "__main__":
    main()
