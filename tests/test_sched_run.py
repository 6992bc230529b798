"""The real process: sockets, the worker, signals."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from crossedge.latency.report import CONTENT_TYPE, PATH
from crossedge.sched.main import scheduler
from crossedge.sched.serve import lines
from tests.processes import descendants
from tests.sched_fleet import BEARER, CA, TOKEN, Fleet, two_regions
from tests.waiting import eventually

PORT = 18478
START_TIMEOUT = 60.0
COMMAND = str(Path(sys.executable).with_name("crossedge-sched"))


def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
    try:
        connection.request(
            method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content.startswith((b"{", b"[")) else content
    finally:
        connection.close()


def is_ready() -> bool:
    try:
        return ask("GET", "/readyz")[0] == 200
    except OSError:
        return False


def until_ready() -> None:
    assert eventually(is_ready, START_TIMEOUT), "the scheduler did not become ready"


@contextmanager
def running(root: Path) -> Iterator[subprocess.Popen[str]]:
    command = [COMMAND, "run", "--root", str(root)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert f"listening on http://127.0.0.1:{PORT}, http://[::1]:{PORT}; writes want the token" in line
            yield process
        finally:
            process.kill()


def report_all(fleet: Fleet) -> None:
    for row, node in enumerate(fleet.nodes):
        status, answer = ask(
            "POST", PATH, node.report(time.time(), fleet.pairs(row)), Content_Type=CONTENT_TYPE
        )
        assert status == 204, answer


def test_a_killed_scheduler_leaves_nothing_running_and_comes_back_with_its_services(tmp_path: Path) -> None:
    (tmp_path / "etc/crossedge").mkdir(parents=True)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    key = base64.b64encode(CA.public).decode()
    (tmp_path / "etc/crossedge/sched.toml").write_text(
        f'network = "{key}"\nlisten = ["127.0.0.1:{PORT}", "[::1]:{PORT}", "overlay:{PORT}"]\n'
        'token_file = "/token"\n[rounds]\nevery = 1\n'
    )
    fleet = Fleet(two_regions())
    with running(tmp_path) as process:
        report_all(fleet)
        until_ready()
        body = json.dumps({"replicas": 2}).encode()
        headers = {"Authorization": BEARER["Authorization"], "Content_Type": "application/json"}
        status, shop = ask("PUT", "/v1/services/shop", body, **headers)
        assert (status, len(shop["current"])) == (201, 2)
        shown = CliRunner().invoke(scheduler, ["show", "--root", str(tmp_path), "--json"])
        found = json.loads(shown.output)
        assert found["status"]["nodes"]["fresh"] == 8
        assert any(line.startswith("service shop: ") for line in lines(found))
        helpers = descendants(process.pid) - {process.pid}
        assert helpers
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert eventually(lambda: all(map(is_gone, helpers)), 30.0), "the worker outlives its parent"
    with running(tmp_path) as process:
        report_all(fleet)
        until_ready()
        assert ask("GET", "/v1/services/shop")[1]["current"] == shop["current"]
        assert ask("GET", "/v1/history?limit=1")[1]["rounds"][0]["round"] > 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, be it that nobody has collected it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
