"""The history: what is kept, what outlives a kill at any step, and what is thrown away."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from crossedge.sched.history import FILE, History, RoundRow
from crossedge.wire.errors import ConfigError
from tests.sched_fleet import BEARER, Fleet, VirtualClock, client_of, make_service, post_report, two_regions
from tests.sched_history_writer import opened, whole, write

WRITER = Path(__file__).with_name("sched_history_writer.py")


def test_whatever_step_a_kill_meets_the_history_is_whole(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-P", str(WRITER), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    steps = {name for name, _ in seen}
    assert steps >= {
        "schema",
        "service",
        "groups",
        "round",
        "nodes",
        "services",
        "decisions",
        "state",
        "commit",
    }
    assert steps >= {"trim", "trim-groups", "vacuum"}
    rounds = [last for _, last in seen]
    assert rounds == sorted(rounds)  # nothing that was there is lost
    assert rounds[-1] >= 3


def test_a_kill_at_any_moment_leaves_whole_rounds(tmp_path: Path) -> None:
    """Here the kernel's clock chooses, also within a write of SQLite's own."""
    last = 0
    for stop_after in (1, 4, 9):
        with subprocess.Popen(
            [sys.executable, "-P", str(WRITER), str(tmp_path), "on"], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            told = 0
            for line in child.stdout:
                if line.strip().isdigit():
                    told = int(line)
                    if told >= last + stop_after:
                        break
            child.send_signal(signal.SIGKILL)
            child.wait()
        history = opened(tmp_path)
        last = whole(history)
        history.close()
        assert told >= stop_after
        assert last >= told


def test_old_rounds_go_by_age_and_by_size(tmp_path: Path) -> None:
    history = opened(tmp_path, days=1.0)
    for number in range(1, 41):
        write(history, number, unix=number * 3600.0)
    kept = [row["round"] for row in history.rounds(1000)]
    assert kept == list(range(40, 40 - len(kept), -1))
    assert 24 <= len(kept) <= 44
    assert len(history.decisions(1000, None, None)) == len(kept)
    history.close()
    small = opened(tmp_path, megabytes=1.0)
    small.save_round(
        RoundRow(41, 0.0, {}, {}, {f"{i}-{os.urandom(9).hex()}": None for i in range(90_000)}), [], [], [], {}
    )
    before = small.size
    assert before > 1e6
    for _ in range(40):
        small.trim(0.0)
        if small.size < 1e6:
            break
    assert small.size < 1e6
    assert whole_or_empty(small)
    small.close()


def whole_or_empty(history: History) -> bool:
    return not [fault for fault in history.check() if "state is of round" not in fault]


def test_groups_that_stay_are_kept_once(tmp_path: Path) -> None:
    history = opened(tmp_path)
    for number in range(1, 6):
        write(history, number, groups=1)
    first, last = history.round(1), history.round(5)
    assert first is not None
    assert last is not None
    assert first["labels"] == last["labels"]
    history.close()
    with sqlite3.connect(tmp_path / FILE) as database:
        assert database.execute("SELECT count(*) FROM groupings").fetchone() == (1,)
    database.close()


def test_a_history_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    history = opened(tmp_path / "a")
    with pytest.raises(ConfigError, match="another scheduler runs"):
        opened(tmp_path / "a")
    history.close()
    opened(tmp_path / "a").close()
    with sqlite3.connect(tmp_path / "a" / FILE) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match="a later crossedge wrote this one"):
        opened(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FILE).write_bytes(b"no database at all" * 1000)
    with pytest.raises(ConfigError, match="move it away"):
        opened(tmp_path / "b")
    assert (tmp_path / "a" / FILE).stat().st_mode & 0o077 == 0


@pytest.mark.asyncio
async def test_a_restart_forgets_nothing_that_matters(tmp_path: Path) -> None:
    clock, fleet = VirtualClock(), Fleet(two_regions())
    service = make_service(tmp_path, clock)
    async with client_of(service) as client:
        old = fleet.nodes[2].report(clock.unix(), fleet.pairs(2))
        fleet.report_all(service)
        await service.round()
        await client.put("/v1/services/shop", json={"replicas": 2}, headers=BEARER)
        await client.put("/v1/services/gone", json={"replicas": 1}, headers=BEARER)
        await client.delete("/v1/services/gone", headers=BEARER)
        view = service.scheduler.view
        placed = (await client.get("/v1/services")).json()
    await service.stop()

    clock.at += 20
    service = make_service(tmp_path, clock)
    async with client_of(service) as client:
        assert (await client.get("/v1/services")).json() == placed
        states = {node["name"]: node["state"] for node in (await client.get("/v1/nodes")).json()["nodes"]}
        assert states == dict.fromkeys([f"n{i}" for i in range(8)], "silent")
        assert (await post_report(client, old)).json() == {"error": "needs-full", "reason": "old", "seq": 2}
        fleet.report_all(service, silent=["n0", "n7"])
        await service.round()
        assert "nothing is decided yet" in (await client.get("/v1/status")).json()["problems"][0]
        assert (await client.get("/readyz")).status_code == 503
        shop = (await client.get("/v1/services/shop")).json()
        assert shop["current"] == placed["services"][0]["current"]
        clock.at += 30
        fleet.report_all(service)
        await service.round()
        assert (await client.get("/readyz")).status_code == 200
        assert service.scheduler.round == 3
        assert (service.scheduler.view.labels == view.labels).all()
        assert abs(service.scheduler.view.points - view.points).max() < 1.0
    await service.stop()


@pytest.mark.asyncio
async def test_a_full_disk_is_said_and_nothing_is_claimed_to_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(tmp_path)
    fleet = Fleet(two_regions())

    def broken(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async with client_of(service) as client:
        fleet.report_all(service)
        monkeypatch.setattr(service.history, "_write", broken)
        await service.round()
        assert len((await client.get("/v1/groups")).json()["groups"]) == 2
        response = await client.put("/v1/services/shop", json={"replicas": 1}, headers=BEARER)
        assert (response.status_code, response.json()["error"]) == (503, "not-stored")
        assert (await client.get("/v1/services")).json() == {"services": []}
        assert "disk is full" in (await client.get("/v1/status")).json()["problems"][0]
    await service.stop()
