"""`crossedge ca` and `crossedge node` as a shell calls them, in an empty directory."""

from __future__ import annotations

import sys
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from crossedge.cli.main import main
from crossedge.wire.bundle import Bundle

RENDEZVOUS = f"203.0.113.1:3478#{b64encode(bytes(range(32))).decode()}"
SECOND = f"[2001:db8::1]:3478#{b64encode(bytes(range(32))).decode()}"


@dataclass
class Result:
    status: int
    out: str
    err: str


Run = Callable[..., Result]


def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a caller of the whole command, as a shell would call it, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["crossedge", *arguments])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err)

    return call


def good(result: Result) -> Result:
    assert result.status == 0, result.err
    return result


def refused(result: Result, *parts: str) -> None:
    """Check that a mistake is status 2 and one line that has all the parts."""
    assert result.status == 2
    assert result.out == ""
    assert len(result.err.strip().splitlines()) == 1, result.err
    for part in parts:
        assert part in result.err


def new_authority(run: Run) -> Run:
    """Return the caller with an authority in `ca` and requests of two nodes in `a` and `b`."""
    good(run("ca", "init", "--dir", "ca"))
    for name in "ab":
        good(run("node", "init", "--name", f"edge-{name}", "--dir", name))
    return run


def sign(run: Run, name: str, *more: str) -> Bundle:
    good(run("ca", "sign", f"{name}/node.request", "--dir", "ca", "-o", f"{name}.bundle", *more))
    bundle = Bundle.from_text(Path(f"{name}.bundle").read_bytes())
    bundle.verify()
    return bundle


def join(run: Run, bundle: str, name: str) -> Result:
    return run("node", "join", bundle, "--dir", name, "--bundle", f"{name}/node.bundle")
