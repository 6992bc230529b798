"""The demo itself: what it promises is kept, what it writes is as stated, and Ctrl-C leaves nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crossedge.lab.pings import parse_ping
from tests.processes import alive, descendants
from tests.waiting import until

pytestmark = pytest.mark.namespaces

COMMAND = [sys.executable, "-c", "from crossedge.cli.main import main; main()", "lab", "demo", "--output"]
OF_TIME = ("time to direct", "it took")
"""Promises of speed are kept by `make demo` on a machine of its own; here others may be at work."""


def test_every_pod_reaches_every_pod_and_nothing_is_in_the_clear(tmp_path: Path) -> None:
    run = subprocess.run([*COMMAND, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout, run.stderr
    result = json.loads((tmp_path / "demo.json").read_text())
    broken = [check["promise"] for check in result["checks"] if not check["kept"]]
    assert [promise for promise in broken if not promise.startswith(OF_TIME)] == []
    assert run.returncode == bool(broken)
    assert {"seconds", "nodes", "pairs"} <= set(result)
    assert len(result["nodes"]) == 6
    assert all({"name", "region", "nat"} <= set(node) for node in result["nodes"])
    assert len(result["pairs"]) == 15
    for pair in result["pairs"]:
        assert {"a", "b", "path", "rtt_ms", "time_to_direct_ms", "lost", "ipv4", "ipv6"} <= set(pair)
        assert (pair["path"], pair["lost"], pair["ipv4"], pair["ipv6"]) == ("direct", 0, True, True)
        assert pair["rtt_ms"] > 0
        assert pair["time_to_direct_ms"] > 0
    outputs = list((tmp_path / "demo/ping").glob("*--cold.txt"))
    assert len(outputs) == 15
    for path in outputs:
        ping = parse_ping(path.read_text())
        assert (ping.sent, ping.missing) == (100, []), path.name


@pytest.mark.parametrize(
    ("number", "at", "processes"),
    [
        (signal.SIGINT, "daemons:", 12),  # launcher, unshare, lab, three workers, rendezvous, six daemons
        (signal.SIGTERM, "network:", 5),
        (signal.SIGKILL, "network:", 5),
    ],
)
def test_stopped_in_the_middle_it_leaves_nothing(
    tmp_path: Path, number: signal.Signals, at: str, processes: int
) -> None:
    output = tmp_path / "out"
    with subprocess.Popen(
        [*COMMAND, str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        said = ""
        while at not in said:
            line = run.stdout.readline()
            said += line
            assert line, f"the demo ended before it said {at!r}: {said}{run.communicate()[1]}"
        started = descendants(run.pid)
        run.send_signal(number)
        rest, errors = run.communicate(timeout=60)
    assert len(started) >= processes
    assert run.returncode == (-number if number == signal.SIGKILL else 130), rest + errors
    assert "Traceback" not in rest + errors
    until("every process of the demo has ended", lambda: not alive(started), 5.0)
    assert not (output / "demo.json").exists()
