"""Writes a history in which every part of a round names the round; run by itself it is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from crossedge.sched.config import HistorySettings
from crossedge.sched.history import History, NodeRow, RoundRow, ServiceRow

NAMES = [f"n{i}" for i in range(20)]


def opened(directory: Path, step: Callable[[str], None] | None = None, **settings: float) -> History:
    return History(directory, HistorySettings(**settings), step)


def service_row(number: int) -> ServiceRow:
    return ServiceRow("shop", '{"replicas": 1}', 1.0, float(number), (f"n{number % 20}",), None)


def write(history: History, number: int, unix: float = 0.0, groups: int = 2) -> None:
    """Keep one round whose parts all name its number."""
    labels = {name: (index + number) % groups for index, name in enumerate(NAMES)}
    history.save_round(
        RoundRow(number, unix + number, {"moves": number}, labels, dict.fromkeys(NAMES, float(number))),
        [NodeRow(name.encode() * 8, name, 1.0, float(number), number, 1) for name in NAMES],
        [service_row(number)],
        [("shop", json.dumps({"reason": str(number)}))],
        {"round": number, "round_time": unix + number, "groups": labels},
    )


def whole(history: History) -> int:
    """Return the last round, having seen that all its parts are there and of one round."""
    assert history.check() == []
    last = history.last_round()
    if last:
        row = history.round(last)
        assert row is not None
        assert (row["moves"], row["ages_s"]["n3"]) == (last, float(last))
        assert row["labels"] == history.state("groups")
        assert {node.seq for node in history.nodes()} == {last}
        assert history.services()[0].current == (f"n{last % 20}",)
        assert history.decisions(1, None, None)[0]["reason"] == str(last)
    return last


def killer(directory: Path, steps: int) -> Callable[[str], None]:
    """Return what kills this process before its next step after so many, and leaves the step's name."""
    left = steps

    def step(name: str) -> None:
        nonlocal left
        if left == 0:
            (directory / "step").write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    return step


def driver(directory: Path) -> None:
    """Kill a writer at its first step, then at its second, ... until one gets through; print what was seen."""
    seen = []
    for attempt in range(400):
        child = os.fork()
        if child == 0:
            history = opened(
                directory, killer(directory, attempt // 2), days=1e-4 * 8
            )  # 8.64 s of rounds a second apart: trimming too
            if not history.services():
                history.save_service(service_row(0))
            first = history.last_round()
            for number in range(first + 1, first + 4):
                write(history, number)
            history.trim(first + 3.0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        history = opened(directory)
        last = whole(history)
        history.close()
        if os.WIFSIGNALED(status):
            seen.append(((directory / "step").read_text(), last))
        else:
            assert os.WEXITSTATUS(status) == 0
            break
    print(json.dumps(seen))


def go_on(directory: Path) -> None:
    """Write rounds until somebody kills this; print the number of each that is written."""
    history = opened(directory)
    if not history.services():
        history.save_service(service_row(0))
    for number in range(history.last_round() + 1, 10**9):
        write(history, number)
        print(number, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        go_on(Path(sys.argv[1]))
    else:
        driver(Path(sys.argv[1]))
