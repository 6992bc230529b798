"""`crossedge-rendezvous`: its key, its configuration, one line for each mistake."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from crossedge.rendezvous import main as command_module
from crossedge.wire.armour import armour
from crossedge.wire.bundle import RendezvousAddress

Command = Callable[..., "Result"]
Check = Callable[[], "Result"]


class Result:
    """What a command printed, and its exit status."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status = status
        self.stdout = stdout
        self.stderr = stderr


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*arguments: str) -> Result:
        monkeypatch.setattr("sys.argv", ["crossedge-rendezvous", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_module.main()
        captured = capsys.readouterr()
        status = ended.value.code
        assert isinstance(status, int)
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def root(tmp_path: Path, command: Command) -> Path:
    key = base64.b64encode(bytes(32)).decode()
    made = command("init", "--root", str(tmp_path), "--address", "rv.example.org", "--network", key)
    assert made.status == 0, made.stderr
    return tmp_path


@pytest.fixture
def check(root: Path, command: Command) -> Check:
    return lambda: command("run", "--check-config", "--root", str(root))


def test_init_makes_a_private_key_and_prints_what_nodes_need(
    root: Path, command: Command, check: Check
) -> None:
    key = root / "etc/crossedge/rendezvous.key"
    assert key.stat().st_mode & 0o777 == 0o600
    shown = command("show", "--root", str(root))
    name = RendezvousAddress.parse(shown.stdout.strip())
    assert (name.host, name.port) == ("rv.example.org", 3478)
    assert check().status == 0


def test_init_leaves_a_key_that_is_there(root: Path, command: Command, check: Check) -> None:
    key = root / "etc/crossedge/rendezvous.key"
    before = key.read_bytes()
    again = command("init", "--root", str(root))
    assert again.status == 2
    assert str(key) in again.stderr
    assert key.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("colour = 1", "colour", "known key"),
        ("[limits]\nnode_speed = 1", "limits.node_speed", "node_rate"),
        ("listen = 3478", "listen", "array"),
        ('listen = ["rv.example.org:3478"]', "listen.0", "address:port"),
        ('alternate = ["192.0.2.2"]', "listen", "192.0.2.2"),
        ("[relay]\nidle = 1", "relay.idle", "30"),
        ('log_level = "loud"', "log_level", "info"),
        ("listen = [", "(whole file)", "TOML"),
    ],
)
def test_bad_configuration_is_one_line_naming_file_and_key(
    root: Path, check: Check, line: str, key: str, expected: str
) -> None:
    file = root / "etc/crossedge/rendezvous.toml"
    file.write_text(f"{file.read_text()}\n{line}\n")
    shown = check()
    assert shown.status == 2
    (message,) = shown.stderr.splitlines()
    assert message.startswith(f"crossedge-rendezvous: {file}: {key}: expected ")
    assert expected in message


@pytest.mark.parametrize("networks", ["[]", '["c2hvcnQ="]', '["?"]'])
def test_network_that_is_no_key_is_refused(root: Path, check: Check, networks: str) -> None:
    file = root / "etc/crossedge/rendezvous.toml"
    file.write_text(f"networks = {networks}\n")
    shown = check()
    assert shown.status == 2
    assert "CA key" in shown.stderr


def test_key_file_that_others_may_read_is_refused(root: Path, command: Command, check: Check) -> None:
    key = root / "etc/crossedge/rendezvous.key"
    key.chmod(0o640)
    shown = check()
    assert shown.status == 2
    assert shown.stderr.count("\n") == 1
    assert str(key) in shown.stderr
    assert "0600" in shown.stderr


def test_key_of_another_kind_or_none_is_refused(root: Path, command: Command, check: Check) -> None:
    key = root / "etc/crossedge/rendezvous.key"
    key.write_text(armour("SIGNING KEY", bytes(32)))
    assert "RENDEZVOUS KEY" in check().stderr
    key.unlink()
    shown = check()
    assert shown.status == 2
    assert str(key) in shown.stderr


def test_missing_configuration_is_named(tmp_path: Path, command: Command) -> None:
    shown = command("run", "--root", str(tmp_path))
    assert shown.status == 2
    assert str(tmp_path / "etc/crossedge/rendezvous.toml") in shown.stderr


def test_status_without_a_server_says_where_it_looked(root: Path, command: Command, check: Check) -> None:
    shown = command("status", "--root", str(root))
    assert shown.status == 1
    assert str(root / "run/crossedge-rendezvous/control.sock") in shown.stderr


def test_key_is_taken_from_the_service_managers_credentials(
    root: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = root / "credentials"
    credentials.mkdir()
    key = root / "etc/crossedge/rendezvous.key"
    key.rename(credentials / key.name)
    (credentials / key.name).chmod(0o440)
    assert check().status == 2
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert check().status == 0


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.1", "192.0.2.1:3478"),
        ("rv.example.org:4000", "rv.example.org:4000"),
        ("2001:db8::1", "[2001:db8::1]:3478"),
        ("[2001:db8::1]:4000", "[2001:db8::1]:4000"),
    ],
)
def test_address_may_name_a_port(tmp_path: Path, command: Command, address: str, name: str) -> None:
    made = command("init", "--root", str(tmp_path), "--address", address)
    assert made.stdout.startswith(f"{name}#")


@pytest.mark.parametrize("address", ["1.2.3", "a b", "host:0", "host:70000"])
def test_address_that_is_none_is_refused_and_makes_nothing(
    tmp_path: Path, command: Command, address: str
) -> None:
    made = command("init", "--root", str(tmp_path), "--address", address)
    assert made.status == 2
    assert "--address" in made.stderr
    assert not list(tmp_path.iterdir())
