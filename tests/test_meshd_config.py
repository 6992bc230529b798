"""Bad configuration of the daemon: one line that names file, key and what was expected; exit status 2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
KEY = "A" * 43 + "="


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an installed command with its output captured."""
    name, *rest = (str(argument) for argument in arguments)
    return subprocess.run([BIN / name, *rest], capture_output=True, text=True, check=False)


def make_node(directory: Path, name: str, ca: Path) -> Path:
    """Return the root of a node that has joined the network of `ca`, made with the real commands."""
    root = directory / name
    request, bundle = directory / f"{name}.request", directory / f"{name}.bundle"
    if not ca.exists():
        assert run("crossedge", "ca", "init", "--dir", ca).returncode == 0
    assert run("crossedge", "--root", root, "node", "init", "--name", name, "-o", request).returncode == 0
    server = ("--rendezvous", f"192.0.2.1:3478#{KEY}")
    signed = run("crossedge", "ca", "sign", request, "--dir", ca, *server, "-o", bundle)
    assert signed.returncode == 0, signed.stderr
    joined = run("crossedge", "--root", root, "node", "join", bundle)
    assert joined.returncode == 0, joined.stderr
    return root


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root directory of a good node."""
    directory = tmp_path_factory.mktemp("network")
    return make_node(directory, "a", directory / "ca")


def check(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Ask the daemon whether it would run."""
    return run("meshd", "run", "--root", root, "--check-config", *arguments)


def test_good_node_says_what_it_would_run_as(node: Path) -> None:
    answer = check(node)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("good: node a, pods 10.160.")


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("prot = 1", "prot", "a known key"),
        ("[listen]\nport = 'x'", "listen.port", "a valid integer"),
        ("[[inbound]]\ngroup = 'g'\nprotocol = 'icmp'\nports = ['7']", "inbound.0", "no ports with protocol"),
        (
            2 * f"[[static_peer]]\nname = 'w'\npublic_key = '{KEY}'\nallowed_ips = ['10.8.0.2/32']\n",
            "static_peer",
            "another name for each",
        ),
        ("log_level = 'loud'", "log_level", "'debug', 'info', 'warning' or 'error'"),
        ("[[inbound]]\ngroup = 'g'\nprotocol = 'gre'", "inbound.0.protocol", "'tcp', 'udp', 'icmp' or 'any'"),
        ("[tun]\nname = 'a name that is far too long'", "tun.name", "pattern"),
        ("= 1", "(whole file)", "TOML"),
    ],
)
def test_mistake_in_the_file_is_one_line_and_status_2(node: Path, text: str, key: str, expected: str) -> None:
    file = node / "bad.toml"
    file.write_text(text)
    answer = check(node, "--config", file)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith(f"meshd: {file}: {key}: expected ")
    assert expected in answer.stderr


def test_missing_file_that_was_named_is_an_error(node: Path) -> None:
    answer = check(node, "--config", node / "none.toml")
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"meshd: {node / 'none.toml'}: expected a readable TOML file")


def open_to_others(root: Path) -> Path:
    """Let everybody read the signing key."""
    key = root / "var/lib/crossedge/meshd/signing.key"
    key.chmod(0o644)
    return key


def missing_key(root: Path) -> Path:
    """Take the session key away."""
    key = root / "var/lib/crossedge/meshd/session.key"
    key.unlink()
    return key


def key_is_a_directory(root: Path) -> Path:
    """Put something unreadable in the place of the session key."""
    key = missing_key(root)
    key.mkdir()
    return key


def no_bundle(root: Path) -> Path:
    """Take the bundle away."""
    bundle = root / "etc/crossedge/node.bundle"
    bundle.unlink()
    return bundle


def torn_bundle(root: Path) -> Path:
    """Lose the second half of the bundle."""
    bundle = root / "etc/crossedge/node.bundle"
    bundle.write_bytes(bundle.read_bytes()[:200])
    return bundle


def bundle_of_another_network(root: Path) -> Path:
    """Put the bundle of a node of the same name in another network there."""
    other = make_node(root / "elsewhere", "a", root / "elsewhere" / "ca")
    bundle = root / "etc/crossedge/node.bundle"
    bundle.write_bytes((other / "etc/crossedge/node.bundle").read_bytes())
    return bundle


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (open_to_others, "mode 0600"),
        (missing_key, "SESSION KEY"),
        (key_is_a_directory, "SESSION KEY"),
        (no_bundle, "the bundle of this node (crossedge node join puts it there)"),
        (torn_bundle, "a bundle signed by one network's authority"),
        (bundle_of_another_network, "it is for other keys"),
    ],
)
def test_bad_identity_names_the_file_and_status_2(
    tmp_path: Path, fault: Callable[[Path], Path], expected: str
) -> None:
    root = make_node(tmp_path, "a", tmp_path / "ca")
    (root / "elsewhere").mkdir()
    file = fault(root)
    answer = check(root)
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith(f"meshd: {file}: expected ")
    assert expected in answer.stderr


def test_preshared_key_that_others_may_read_is_refused(node: Path, tmp_path: Path) -> None:
    secret = tmp_path / "laptop.psk"
    secret.write_text(KEY)
    secret.chmod(0o640)
    file = tmp_path / "meshd.toml"
    file.write_text(
        f"[[static_peer]]\nname = 'laptop'\npublic_key = '{KEY}'\nallowed_ips = ['10.9.0.2/32']\n"
        f"preshared_key_file = '{secret.relative_to(tmp_path)}'\n"
    )
    answer = subprocess.run(
        [BIN / "meshd", "run", "--root", node, "--config", file, "--check-config"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert "laptop.psk: expected a base64 key with mode 0600" in answer.stderr


def test_help_of_every_command_is_there() -> None:
    for arguments in (["meshd"], ["meshd", "run"], ["meshd", "cleanup"], ["crossedge"], ["crossedge", "ca"]):
        answer = run(*arguments, "--help")
        assert answer.returncode == 0
        assert "Usage:" in answer.stdout
