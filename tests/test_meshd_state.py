"""State survives a restart, a crash in the middle of a write, and damaged files."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from crossedge.meshd.sequence import Sequence
from crossedge.meshd.state import Members, StateStore
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import ConfigError

RECORDS = ((b"record one", b"certificate one"), (b"record two", b"certificate two"))
ACTIVE = (
    (b"n" * 16, UdpEndpoint("192.0.2.1", 7)),
    (b"m" * 16, UdpEndpoint("2001:db8::1", 9)),
    (b"k" * 16, None),
)


def test_an_empty_directory_is_a_first_start(tmp_path: Path) -> None:
    with StateStore(tmp_path / "var" / "meshd") as store:
        assert (store.sequence, store.known_time) == (0, 0.0)
        assert store.load_members() == Members()
        assert store.load_blocklist() is None
        assert store.problems == []
    assert (tmp_path / "var" / "meshd").stat().st_mode & 0o777 == 0o700


def test_everything_comes_back(tmp_path: Path) -> None:
    with StateStore(tmp_path) as store:
        store.reserve(12345)
        store.save_time(1.76e9)
        store.save_members(RECORDS, ACTIVE)
        store.save_blocklist(b"signed bytes")
    with StateStore(tmp_path) as store:
        assert (store.sequence, store.known_time) == (12345, 1.76e9)
        assert store.load_members() == Members(RECORDS, ACTIVE)
        assert store.load_blocklist() == b"signed bytes"
        assert store.problems == []
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_floors_never_go_down(tmp_path: Path) -> None:
    with StateStore(tmp_path) as store:
        store.reserve(1000)
        store.reserve(10)
        store.save_time(1.76e9)
        store.save_time(0.0)
    with StateStore(tmp_path) as store:
        assert (store.sequence, store.known_time) == (1000, 1.76e9)


def test_sequence_numbers_go_on_across_lives_with_a_clock_in_1970(tmp_path: Path) -> None:
    last = 0
    for life, unix in enumerate((1.76e9, 0.0, 60.0, 1.76e9)):
        with StateStore(tmp_path) as store:
            sequence = Sequence(store.sequence, partial(float.__add__, unix), store.reserve)
            number = sequence.next(float(life))
            assert number > last
            last = number


def test_two_daemons_cannot_share_their_state(tmp_path: Path) -> None:
    with StateStore(tmp_path), pytest.raises(ConfigError, match="no other meshd"):
        StateStore(tmp_path)
    StateStore(tmp_path).close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    blocking = tmp_path / "file"
    blocking.write_text("x")
    with pytest.raises(ConfigError, match=f"^{blocking}: expected a directory"):
        StateStore(blocking)


@pytest.mark.parametrize("name", ["floors.json", "members", "blocklist"])
def test_a_crash_while_writing_leaves_the_old_content(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(store: StateStore, generation: int) -> None:
        store.reserve(generation)
        store.save_members([(b"%d" % generation, b"")], [])
        store.save_blocklist(b"%d" % generation)

    with StateStore(tmp_path) as store:
        write(store, 1)

    def power_fails(descriptor: int) -> None:
        raise KeyboardInterrupt

    with StateStore(tmp_path) as store:
        monkeypatch.setattr("crossedge.host.files.os.fsync", power_fails)
        with pytest.raises(KeyboardInterrupt):
            store.reserve(2)
        with pytest.raises(KeyboardInterrupt):
            store.save_members([(b"2", b"")], [])
        with pytest.raises(KeyboardInterrupt):
            store.save_blocklist(b"2")
        monkeypatch.undo()
        assert store.sequence == 1
    (tmp_path / f".{name}.123.abc").write_bytes(b"half of")
    with StateStore(tmp_path) as store:
        assert store.sequence == 1
        assert store.load_members().records == ((b"1", b""),)
        assert store.load_blocklist() == b"1"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("floors.json", b""),
        ("floors.json", b"[]"),
        ("floors.json", b"\xff\xfe"),
        ("floors.json", b"[" * 4000),
        ("floors.json", json.dumps({"sequence": -1, "unix": 0}).encode()),
        ("floors.json", json.dumps({"sequence": 2**64, "unix": 0}).encode()),
        ("floors.json", json.dumps({"sequence": 1.5, "unix": 0}).encode()),
        ("floors.json", b'{"sequence": 1, "unix": NaN}'),
        ("floors.json", b"9" * 10_000),
        ("members", b""),
        ("members", b"\x80"),
        ("members", b"\x83\xa6format\x01\xa7records\x91\x01\xa6active\x90"),
        ("members", b"\x83\xa6format\x01\xa7records\x90\xa6active\x91\x92\xc4\x01a\xc4\x01b"),
        ("members", b"\x83\xa6format\x02\xa7records\x90\xa6active\x90"),
        ("blocklist", bytes(1 << 20)),
    ],
)
def test_damaged_file_is_put_aside_and_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with StateStore(tmp_path) as store:
        assert (store.sequence, store.known_time) == (0, 0.0)
        assert store.load_members() == Members()
        assert store.load_blocklist() is None
        [problem] = store.problems
        assert problem.startswith(f"{tmp_path / name}: put aside as {name}.damaged")
        store.reserve(7)
    assert (tmp_path / f"{name}.damaged").read_bytes() == content
    with StateStore(tmp_path) as store:
        assert store.problems == []
        assert store.sequence == 7


def test_a_blocklist_that_does_not_hold_is_put_aside(tmp_path: Path) -> None:
    with StateStore(tmp_path) as store:
        store.save_blocklist(b"of another network")
        store.refuse_blocklist("other-network")
        assert store.load_blocklist() is None
        assert len(store.problems) == 1


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    program = "from crossedge.meshd.state import StateStore; import pathlib, sys; "
    program += "StateStore(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    StateStore(tmp_path).close()
