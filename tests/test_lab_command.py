"""`crossedge lab`: up, status, exec, down; and whoever is killed, nothing stays behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import alive, descendants
from tests.waiting import eventually

pytestmark = pytest.mark.namespaces

COMMAND = [sys.executable, "-c", "from crossedge.cli.main import main; main()", "lab"]
TOPOLOGY = """
name = "small"
[[region]]
name = "a"
[[node]]
name = "left"
region = "a"
[[node]]
name = "right"
router = "box"
[[router]]
name = "box"
region = "a"
nat = "full-cone"
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "small.toml").write_text(TOPOLOGY)
    yield tmp_path
    subprocess.run([*COMMAND, "down"], cwd=tmp_path, capture_output=True, check=False)


def call(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], cwd=place, capture_output=True, text=True, timeout=30, check=False
    )


def start(place: Path) -> subprocess.Popen[str]:
    """Start a lab in the foreground; return when it says that it is up."""
    child = subprocess.Popen(
        [*COMMAND, "up", "small.toml"], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "lab small is up: left, right\n"
    return child


def test_up_status_exec_down(place: Path) -> None:
    up = call(place, "up", "small.toml", "--background")
    assert (up.returncode, up.stdout) == (0, "lab small is up: left, right\n")
    status = json.loads(call(place, "status", "--json").stdout)
    assert [node["name"] for node in status["nodes"]] == ["left", "right"]
    table = call(place, "status").stdout
    assert "full-cone" in table
    address = status["nodes"][0]["ipv4"]
    assert call(place, "exec", "right", "--", "ping", "-c", "1", "-W", "2", address).returncode == 0
    assert call(place, "exec", "right", "--", "sh", "-c", "exit 7").returncode == 7
    assert call(place, "exec", "right", "--", "pwd").stdout.strip() == str(place)
    again = call(place, "up", "small.toml")
    assert again.returncode == 2
    assert again.stderr.startswith("crossedge: a lab is up in ")
    assert call(place, "down").returncode == 0
    gone = call(place, "status")
    assert gone.returncode == 2
    assert gone.stderr.startswith("crossedge: no lab is up in ")


def test_an_unknown_node_is_one_line(place: Path) -> None:
    call(place, "up", "small.toml", "-b")
    refused = call(place, "exec", "nobody", "--", "true")
    assert (refused.returncode, refused.stderr) == (2, "crossedge: the lab has no node 'nobody'\n")


def test_a_bad_topology_is_one_line_naming_file_and_key(place: Path) -> None:
    (place / "bad.toml").write_text(TOPOLOGY + "\nspeed = 3\n")
    refused = call(place, "up", "bad.toml")
    assert refused.returncode == 2
    assert refused.stderr.startswith("crossedge: bad.toml: router.0.speed: expected a known key (behind, ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_it_leaves_nothing(place: Path, number: signal.Signals) -> None:
    lab = start(place)
    inside = subprocess.Popen([*COMMAND, "exec", "right", "--", "sleep", "86399"], cwd=place)
    assert eventually(lambda: any(_name(process) == "sleep" for process in descendants(inside.pid)), 30.0)
    started = descendants(lab.pid) | descendants(inside.pid)
    assert len(started) >= 5  # launcher, unshare, lab, its worker, what was started inside
    lab.send_signal(number)
    lab.communicate(timeout=10)
    assert lab.returncode == (-number if number == signal.SIGKILL else 0)
    inside.wait(timeout=10)
    assert eventually(lambda: not alive(started), 30.0)
    assert call(place, "status").returncode == 2
    assert [path.name for path in place.iterdir()] == ["small.toml"]


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""
