"""Descriptors are taken over from the service manager and kept with it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from crossedge.host.descriptors import inherited, notify, ready, stopping, store, unstore

CHILD = """
import os
from crossedge.host.descriptors import inherited
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = "3"
os.environ["LISTEN_FDNAMES"] = "udp:tun:udp"
found = inherited()
assert found == {"udp": [3, 5], "tun": [4]}, found
assert not any(os.get_inheritable(fd) for fd in (3, 4, 5))
assert not [name for name in os.environ if name.startswith("LISTEN_")]
assert inherited() == {}
"""


def test_descriptors_come_by_name_and_stay_ours() -> None:
    wrapped = f'exec 3</dev/null 4</dev/null 5</dev/null "{sys.executable}" -c "$0"'
    subprocess.run(["sh", "-c", wrapped, CHILD], check=True)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid())},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"},
    ],
)
def test_what_is_not_for_us_is_left_alone(environment: dict[str, str]) -> None:
    assert inherited(environment) == {}


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_hears_us_and_gets_the_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    path = f"@crossedge-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path.replace("@", "\0", 1))
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        assert ready("6 peers")
        assert manager.recv(100) == b"READY=1\nSTATUS=6 peers"
        assert stopping()
        assert manager.recv(100) == b"STOPPING=1"
        reader, writer = os.pipe()
        assert store("udp", reader)
        data, (received,), _, _ = socket.recv_fds(manager, 100, 1)
        assert data == b"FDSTORE=1\nFDNAME=udp\nFDPOLL=0"
        os.write(writer, b"same")
        assert os.read(received, 10) == b"same"
        assert unstore("udp")
        assert manager.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=udp"
        for descriptor in (reader, writer, received):
            os.close(descriptor)
    with pytest.raises(ValueError):
        store("a:b", 0)


def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not ready()
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    assert not notify("READY=1")
