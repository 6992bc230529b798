"""An authority across crashes, full disks and two hands at a time: no serial and no prefix is given twice."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crossedge.cli import identityfiles
from crossedge.cli.castate import CertificateAuthority, load_state
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.errors import ConfigError
from tests.identity_commands import (
    RENDEZVOUS,
    Run,
    good,
    new_authority,
    refused,
    runner,
    sign,
)

run = pytest.fixture(runner)
authority = pytest.fixture(new_authority)


class Crash(BaseException):
    """The power going away."""


def crash_at_write(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], object]) -> None:
    """Let the power go away at the write with this number, from 1, of an action."""
    write_atomic = identityfiles.write_atomic
    writes = 0

    def failing(path: Path, data: bytes, mode: int = 0o600) -> None:
        nonlocal writes
        writes += 1
        if writes == at:
            raise Crash
        write_atomic(path, data, mode)

    with monkeypatch.context() as patched:
        patched.setattr(identityfiles, "write_atomic", failing)
        with pytest.raises(Crash):
            action()


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("command", ["revoke", "sign"])
def test_crash_at_any_write_leaves_an_authority_that_works(
    authority: Run, monkeypatch: pytest.MonkeyPatch, command: str, at: int
) -> None:
    run = authority
    first = sign(run, "a", "--rendezvous", RENDEZVOUS)
    arguments = {
        "revoke": ("ca", "revoke", "edge-a", "--dir", "ca"),
        "sign": ("ca", "sign", "a/node.request", "--dir", "ca", "-o", "a.bundle"),
    }
    crash_at_write(monkeypatch, at, lambda: run(*arguments[command]))
    again = sign(run, "a")
    assert again.certificate.serial > first.certificate.serial
    assert again.certificate.prefixes == first.certificate.prefixes
    assert again.blocklist.to_text() == Path("ca/blocklist").read_text()
    good(run("ca", "revoke", "edge-a", "--dir", "ca"))
    assert Blocklist.from_text(Path("ca/blocklist").read_bytes()).revokes(again.certificate)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_crash_while_the_authority_is_made_is_taken_up(
    run: Run, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    crash_at_write(monkeypatch, at, lambda: run("ca", "init", "--dir", "ca"))
    key = Path("ca/ca.key").read_bytes() if at > 1 else None
    if at < 3:
        refused(run("ca", "show", "--dir", "ca"), "crossedge ca init")
        good(run("ca", "init", "--dir", "ca"))
    assert key in (None, Path("ca/ca.key").read_bytes())
    good(run("node", "init", "--name", "edge-a", "--dir", "a"))
    bundle = sign(run, "a", "--rendezvous", RENDEZVOUS)
    assert bundle.blocklist.to_text() == Path("ca/blocklist").read_text()


def test_full_disk_is_one_line(authority: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes, mode: int = 0o600) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(identityfiles, "write_atomic", full)
    sign = ("ca", "sign", "a/node.request", "--dir", "ca", "--rendezvous", RENDEZVOUS)
    refused(authority(*sign), "ca/state.json: expected to be able to write it", "No space left")


SIGN_FIVE_TIMES = """
import sys
from crossedge.cli.main import crossedge
name = sys.argv[1]
for _ in range(5):
    arguments = ["ca", "sign", f"{name}/node.request", "--dir", "ca", "-o", f"{name}.bundle"]
    crossedge(arguments, standalone_mode=False)
"""


def test_two_at_a_time_never_share_a_serial_or_a_prefix(authority: Run) -> None:
    good(authority("node", "init", "--name", "edge-c", "--dir", "c"))
    sign(authority, "c", "--rendezvous", RENDEZVOUS)
    workers = [subprocess.Popen([sys.executable, "-P", "-c", SIGN_FIVE_TIMES, name]) for name in "ab"]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    state = load_state(Path("ca"))
    assert state.serial == 11
    prefixes = [str(prefix) for entry in state.nodes.values() for prefix in entry.prefixes]
    assert len(set(prefixes)) == len(prefixes) == 6


def test_authority_is_open_to_one_at_a_time(authority: Run) -> None:
    with CertificateAuthority.open(Path("ca")) as held:
        held.state.serial = 41
        held._save()
    assert sign(authority, "a", "--rendezvous", RENDEZVOUS).certificate.serial == 42
    with pytest.raises(ConfigError, match="a: expected"), CertificateAuthority.open(Path("a")):
        pass
