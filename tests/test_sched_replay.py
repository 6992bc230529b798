"""The `crossedge-sched replay` command: table, JSON, plots, rounds, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from crossedge.sched.main import main, scheduler
from tests.sched_worlds import noisy, regions


@pytest.fixture
def world(tmp_path: Path) -> Path:
    matrix, _ = regions((14, 10, 8), seed=21)
    np.savez(tmp_path / "one.npz", rtt=matrix.rtt, names=np.array(matrix.names))
    np.savez(tmp_path / "two.npz", rtt=noisy(matrix.rtt, 1), names=np.array(matrix.names))
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(scheduler, ["replay", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_json_has_the_promised_shape(world: Path) -> None:
    found = json.loads(run(str(world / "one.npz"), "--json", "--no-plots", "--replicas", "2,3"))
    assert set(found) == {"nodes", "scale_ms", "groups", "placements", "seconds"}
    assert found["nodes"] == 32
    assert found["scale_ms"] > 0
    assert set(found["groups"]) == {"k", "silhouette", "labels"}
    assert found["groups"]["k"] == 3
    assert len(found["groups"]["labels"]) == 32
    assert [item["replicas"] for item in found["placements"]] == [2, 3]
    for item in found["placements"]:
        assert set(item) == {"replicas", "nodes", "mean_ms", "p95_ms", "bound_ms", "gap", "baselines"}
        assert set(item["baselines"]) == {"random", "spread-evenly", "one-per-group", "greedy"}
        assert item["bound_ms"] <= item["mean_ms"] <= min(item["baselines"].values()) + 1e-9
        assert len(item["nodes"]) == item["replicas"]
    assert set(found["seconds"]) == {"completion", "groups", "placement"}


def test_table_and_plots_are_made(world: Path) -> None:
    text = run(str(world / "one.npz"), "--replicas", "2,3", "--output", str(world / "plots"))
    assert "3 at scale" in text
    assert "one-per-group" in text
    for name in ("one-groups.png", "one-latency.png"):
        assert (world / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_long_form_with_missing_pairs_goes_the_whole_way_and_says_so(tmp_path: Path) -> None:
    matrix, _ = regions((12, 9), seed=22)
    rows, columns, rtt = matrix.pairs()
    kept = np.random.default_rng(1).random(len(rtt)) < 0.6
    lines = [
        f"{matrix.names[row]},{matrix.names[column]},{time if keep else ''}"
        for row, column, time, keep in zip(rows, columns, rtt, kept, strict=True)
    ]
    (tmp_path / "long.csv").write_text("source,dest,ms\n" + "\n".join(lines))
    result = CliRunner().invoke(
        scheduler,
        [
            "replay",
            str(tmp_path / "long.csv"),
            "--replicas=2",
            "--no-plots",
            "--json",
            "--details",
            "--progress",
        ],
        catch_exceptions=False,
    )
    found = json.loads(result.stdout)
    assert found["groups"]["k"] == 2
    assert found["completion"]["estimator"] in {"regional", "coordinates", "shortest-paths"}
    assert found["groups"]["within_ms"] < 30.0
    assert set(found["placements"][0]["baselines_p95_ms"]) == set(found["placements"][0]["baselines"])
    said = result.stderr.splitlines()
    assert said[0] == "long: reading"
    assert f"long: completing {(~kept).sum()} of 210 pairs" in said
    assert said[-1] == "long: placing 2 replicas"


def test_noisy_second_round_keeps_groups_and_places(world: Path) -> None:
    files = str(world / "one.npz"), str(world / "two.npz")
    one, two = json.loads(run(*files, "--json", "--details", "--no-plots", "--replicas", "3"))
    assert one["groups"]["labels"] == two["groups"]["labels"]
    assert "decision" not in one["placements"][0]
    decision = two["placements"][0]["decision"]
    assert decision["moves"] == []
    assert decision["nodes"] == one["placements"][0]["nodes"]


def test_capacities_are_an_option(world: Path) -> None:
    found = json.loads(run(str(world / "one.npz"), "--json", "--no-plots", "--replicas", "3", "--capacities"))
    assert found["placements"][0]["bound_ms"] <= found["placements"][0]["mean_ms"]


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("a,b\n0,x\n1,0\n", [], "is no number"),
        ("0,1\n1,0\n", ["--replicas", "3"], "3 replicas on 2 nodes"),
        ("0\n", [], "fewer than two nodes"),
        ("0,1\n1,0\n", ["--replicas", "many"], "expected numbers such as"),
        ("0,1\n1,0\n", ["--replicas", "0"], "at least one replica"),
        ("0,1\n1,0\n", ["--replicas", "1", "--details"], "--details goes with --json"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, content: str, options: list[str], says: str) -> None:
    (tmp_path / "m.csv").write_text(content)
    result = CliRunner().invoke(scheduler, ["replay", str(tmp_path / "m.csv"), "--no-plots", *options])
    assert result.exit_code != 0
    assert says in result.output
    assert "Traceback" not in result.output


def test_command_ends_with_status_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["crossedge-sched", "replay", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("crossedge-sched: ")
    assert "none.csv" in error
    assert error.count("\n") == 1
