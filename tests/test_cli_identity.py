"""`crossedge ca` and `crossedge node`: from nothing to two joined nodes, and one line for each mistake."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from click.testing import CliRunner

from crossedge.cli import identityfiles
from crossedge.cli.allocation import free_prefix
from crossedge.cli.castate import CertificateAuthority, load_state
from crossedge.cli.main import crossedge, main
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.bundle import Bundle
from crossedge.wire.certificate import Request
from crossedge.wire.errors import ConfigError
from crossedge.wire.keyfiles import KeyKind, parse_key

RENDEZVOUS = f"203.0.113.1:3478#{b64encode(bytes(range(32))).decode()}"
SECOND = f"[2001:db8::1]:3478#{b64encode(bytes(range(32))).decode()}"


@dataclass
class Result:
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
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


@pytest.fixture
def authority(run: Run) -> Run:
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


def test_two_nodes_join_with_five_commands_each(authority: Run) -> None:
    run = authority
    one = sign(run, "a", "--rendezvous", RENDEZVOUS, "--rendezvous", SECOND, "--group", "shops")
    two = sign(run, "b", "--role", "node", "--role", "gateway")
    assert [str(prefix) for prefix in one.certificate.prefixes4] == ["10.160.0.0/24"]
    assert [str(prefix) for prefix in two.certificate.prefixes4] == ["10.160.1.0/24"]
    assert str(one.certificate.overlay4) == "10.159.0.1"
    assert str(two.certificate.overlay4) == "10.159.0.2"
    assert one.certificate.groups == ("shops",)
    assert two.certificate.roles == ("node", "gateway")
    assert [str(address) for address in two.rendezvous] == [RENDEZVOUS, SECOND]
    network6 = one.supernets[-1]
    assert network6.prefixlen == 48
    assert network6.network_address.packed[:6] == b"\xfd" + one.network[:5]
    subnets = list(IPv6Network(str(network6)).subnets(new_prefix=64))[:3]
    assert one.certificate.prefixes6 == (subnets[1],)
    assert two.certificate.prefixes6 == (subnets[2],)
    assert one.certificate.overlay6 in subnets[0]
    for name in "ab":
        good(join(run, f"{name}.bundle", name))
        shown = json.loads(
            good(run("node", "show", "--dir", name, "--bundle", f"{name}/node.bundle", "--json")).out
        )
        assert shown["bundle"]["name"] == f"edge-{name}"
        assert shown["bundle"]["valid"]


def test_keys_stay_private_and_are_of_the_certificate(authority: Run) -> None:
    bundle = sign(authority, "a", "--rendezvous", RENDEZVOUS)
    for file, kind in (
        ("a/session.key", KeyKind.SESSION),
        ("a/signing.key", KeyKind.SIGNING),
        ("ca/ca.key", KeyKind.CA),
    ):
        mode = Path(file).stat().st_mode
        assert mode & 0o777 == 0o600
        private = parse_key(kind, Path(file).read_bytes(), mode)
        assert private not in bundle.encode()
    assert Path("ca").stat().st_mode & 0o777 == 0o700
    Request.from_text(Path("a/node.request").read_bytes()).verify()


def test_root_stands_before_the_default_directories(run: Run) -> None:
    good(run("--root", "r", "ca", "init"))
    good(run("--root", "r", "node", "init", "--name", "edge-a"))
    request = "r/var/lib/crossedge/meshd/node.request"
    good(run("--root", "r", "ca", "sign", request, "--rendezvous", RENDEZVOUS, "-o", "a.bundle"))
    good(run("--root", "r", "node", "join", "a.bundle"))
    assert Path("r/etc/crossedge/node.bundle").read_text() == Path("a.bundle").read_text()
    assert "edge-a" in good(run("--root", "r", "node", "show")).out
    assert "edge-a" in good(run("--root", "r", "ca", "show")).out


def test_request_and_bundle_can_be_piped(authority: Run) -> None:
    asked = good(authority("node", "init", "--name", "edge-a", "--dir", "a", "-o", "-")).out
    runner = CliRunner()
    result = runner.invoke(
        crossedge, ["ca", "sign", "-", "--dir", "ca", "--rendezvous", RENDEZVOUS], input=asked
    )
    assert result.exit_code == 0
    Bundle.from_text(result.stdout.encode()).verify()


def test_node_init_again_keeps_the_keys_unless_new_ones_are_asked_for(run: Run) -> None:
    good(run("node", "init", "--name", "edge-a", "--dir", "a"))
    before = [Path(f"a/{name}.key").read_bytes() for name in ("session", "signing")]
    good(run("node", "init", "--name", "edge-b", "--dir", "a"))
    assert [Path(f"a/{name}.key").read_bytes() for name in ("session", "signing")] == before
    good(run("node", "init", "--name", "edge-b", "--dir", "a", "--new-keys"))
    after = [Path(f"a/{name}.key").read_bytes() for name in ("session", "signing")]
    assert not set(before) & set(after)


def test_signed_again_a_name_keeps_its_prefixes_and_its_serial_rises(authority: Run) -> None:
    first = sign(authority, "a", "--rendezvous", RENDEZVOUS, "--group", "shops")
    sign(authority, "b")
    again = sign(authority, "a")
    assert again.certificate.serial == 3 > first.certificate.serial
    for same in ("name", "prefixes", "overlay4", "overlay6", "groups", "roles"):
        assert getattr(again.certificate, same) == getattr(first.certificate, same)
    assert again.rendezvous == first.rendezvous
    assert not again.blocklist.revokes(first.certificate)
    assert sign(authority, "a", "--no-groups").certificate.groups == ()


def test_new_keys_revoke_the_old_certificate(authority: Run) -> None:
    first = sign(authority, "a", "--rendezvous", RENDEZVOUS)
    good(authority("node", "init", "--name", "edge-a", "--dir", "a", "--new-keys"))
    again = sign(authority, "a")
    assert again.certificate.prefixes == first.certificate.prefixes
    assert again.blocklist.revokes(first.certificate)
    assert not again.blocklist.revokes(again.certificate)


def test_explicit_prefix_is_taken_and_never_given_twice(authority: Run) -> None:
    run = authority
    one = sign(run, "a", "--rendezvous", RENDEZVOUS, "--prefix", "10.160.0.0/23")
    assert [str(prefix) for prefix in one.certificate.prefixes4] == ["10.160.0.0/23"]
    assert len(one.certificate.prefixes6) == 1
    two = sign(run, "b")
    assert [str(prefix) for prefix in two.certificate.prefixes4] == ["10.160.2.0/24"]
    arguments = ("ca", "sign", "b/node.request", "--dir", "ca", "-o", "b.bundle", "--prefix")
    refused(run(*arguments, "10.160.1.0/24"), "--prefix", "10.160.1.0/24 overlaps 10.160.0.0/23 of edge-a")
    refused(run(*arguments, "192.168.0.0/24"), "--prefix", "inside 10.160.0.0/12", "192.168.0.0/24")
    refused(run(*arguments, "10.160.1.7/24"), "--prefix", "host bits")
    overlay = next(IPv6Network(str(one.supernets[-1])).subnets(new_prefix=64))
    refused(run(*arguments, str(overlay)), "--prefix", "overlay")
    refused(run(*arguments, "10.161.0.0/16", "--prefix", "10.161.3.0/24"), "10.161.3.0/24", "10.161.0.0/16")


def test_moved_prefix_revokes_the_certificate_that_had_it(authority: Run) -> None:
    first = sign(authority, "a", "--rendezvous", RENDEZVOUS)
    moved = sign(authority, "a", "--prefix", "10.170.0.0/24")
    assert moved.blocklist.revokes(first.certificate)
    assert sign(authority, "b").certificate.prefixes4 == (IPv4Network("10.160.0.0/24"),)


def test_prefixes_of_a_small_network_run_out_with_one_line(run: Run) -> None:
    good(run("ca", "init", "--dir", "ca", "--pods", "10.0.0.0/23", "--overlay", "10.1.0.0/29"))
    for name in "abc":
        good(run("node", "init", "--name", name, "--dir", name))
    for name in "ab":
        sign(run, name, "--rendezvous", RENDEZVOUS)
    refused(run("ca", "sign", "c/node.request", "--dir", "ca"), "pods", "free prefix")
    assert load_state(Path("ca")).serial == 2


def test_revoked_node_shows_and_is_on_the_list_until_it_is_signed_again(authority: Run) -> None:
    run = authority
    first = sign(run, "a", "--rendezvous", RENDEZVOUS)
    good(run("ca", "revoke", "edge-a", "--dir", "ca", "-o", "list"))
    listed = Blocklist.from_text(Path("list").read_bytes())
    listed.verify(first.ca)
    listed.check_replaces(first.blocklist)
    assert listed.revokes(first.certificate)
    assert Path("ca/blocklist").read_bytes() == Path("list").read_bytes()
    assert "revoked" in good(run("ca", "show", "--dir", "ca")).out
    good(run("ca", "revoke", "edge-a", "--dir", "ca"))
    assert Path("ca/blocklist").read_bytes() == Path("list").read_bytes()
    again = sign(run, "a")
    assert again.blocklist == listed
    assert not listed.revokes(again.certificate)


def test_show_lists_nodes_as_a_table_and_as_json(authority: Run) -> None:
    run = authority
    assert "no node was signed yet" in good(run("ca", "show", "--dir", "ca")).out
    sign(run, "a", "--rendezvous", RENDEZVOUS, "--group", "shops")
    sign(run, "b")
    table = good(run("ca", "show", "--dir", "ca")).out
    assert "10.160.1.0/24" in table
    shown = json.loads(good(run("ca", "show", "--dir", "ca", "--json")).out)
    assert [node["name"] for node in shown["nodes"]] == ["edge-a", "edge-b"]
    assert shown["nodes"][0]["groups"] == ["shops"]
    assert shown["nodes"][0]["state"] == "valid"
    assert shown["pods"] == "10.160.0.0/12"
    assert shown["rendezvous"] == [RENDEZVOUS]


def test_revoke_only_key_revokes_and_the_authority_takes_it_up(authority: Run) -> None:
    run = authority
    first = sign(run, "a", "--rendezvous", RENDEZVOUS)
    second = sign(run, "b")
    good(run("ca", "delegate", "--dir", "ca", "-o", "revoke.key"))
    assert Path("revoke.key").stat().st_mode & 0o777 == 0o600
    Path("list").write_bytes(Path("ca/blocklist").read_bytes())
    good(run("ca", "revoke", "edge-b", "--key", "revoke.key", "--list", "list", "--serial", "2"))
    listed = Blocklist.from_text(Path("list").read_bytes())
    listed.verify(first.ca)
    listed.check_replaces(first.blocklist)
    assert listed.revokes(second.certificate)
    good(run("ca", "revoke", "--merge", "list", "--dir", "ca"))
    own = Blocklist.from_text(Path("ca/blocklist").read_bytes())
    own.check_replaces(listed)
    assert own.delegation == b""
    assert own.revokes(second.certificate)
    assert not own.revokes(sign(run, "b").certificate)


def test_stolen_revoke_only_key_does_not_lock_the_authority_out(authority: Run) -> None:
    run = authority
    bundle = sign(run, "a", "--rendezvous", RENDEZVOUS)
    good(run("ca", "delegate", "--dir", "ca", "-o", "revoke.key"))
    Path("list").write_bytes(Path("ca/blocklist").read_bytes())
    good(run("ca", "revoke", "edge-a", "--key", "revoke.key", "--list", "list", "--serial", str(2**63)))
    stolen = Blocklist.from_text(Path("list").read_bytes())
    assert stolen.revokes(bundle.certificate)
    good(run("ca", "revoke", "--merge", "list", "--dir", "ca"))
    again = sign(run, "a")
    again.blocklist.check_replaces(stolen)
    assert not again.blocklist.revokes(again.certificate)


MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "authority twice": (("ca", "init", "--dir", "ca"), ("ca: expected a directory without",)),
    "no authority": (("ca", "show", "--dir", "a"), ("a: expected a certificate authority's directory",)),
    "sign without one": (
        ("ca", "sign", "a/node.request", "--dir", "a"),
        ("a: expected a certificate authority's",),
    ),
    "request is missing": (
        ("ca", "sign", "none", "--dir", "ca"),
        ("none: expected a request", "No such file"),
    ),
    "request is a key": (
        ("ca", "sign", "a/session.key", "--dir", "ca"),
        ("a/session.key: expected a request", "it is a CROSSEDGE SESSION KEY"),
    ),
    "request is a directory": (("ca", "sign", "a", "--dir", "ca"), ("a: expected a request",)),
    "no rendezvous ever": (
        ("ca", "sign", "a/node.request", "--dir", "ca"),
        ("--rendezvous: expected host:port#key",),
    ),
    "rendezvous without a key": (
        ("ca", "sign", "a/node.request", "--dir", "ca", "--rendezvous", "host:3478"),
        ("--rendezvous: expected 32 bytes of base64", "host:3478"),
    ),
    "rendezvous without a port": (
        ("ca", "sign", "a/node.request", "--dir", "ca", "--rendezvous", "host#AAAA"),
        ("--rendezvous: expected host:port#key",),
    ),
    "group with capitals": (
        ("ca", "sign", "a/node.request", "--dir", "ca", "--rendezvous", RENDEZVOUS, "--group", "Shops"),
        ("--group: expected 1 to 32 of a-z", "'Shops'"),
    ),
    "too many groups": (
        (
            *("ca", "sign", "a/node.request", "--dir", "ca", "--rendezvous", RENDEZVOUS),
            *(f"--group=a-rather-long-name-of-a-group-{n}" for n in range(16)),
        ),
        ("REQUEST: expected what fits a certificate", "499"),
    ),
    "output that cannot be written": (
        ("ca", "sign", "a/node.request", "--dir", "ca", "--rendezvous", RENDEZVOUS, "-o", "none/bundle"),
        ("none/bundle: expected to be able to write it",),
    ),
    "revoke a stranger": (
        ("ca", "revoke", "edge-z", "--dir", "ca"),
        ("NAME: expected a name that was signed here", "edge-z"),
    ),
    "merge what is no list": (
        ("ca", "revoke", "--merge", "a/node.request", "--dir", "ca"),
        ("a/node.request: expected a blocklist",),
    ),
    "pods are no prefix": (("ca", "init", "--dir", "x", "--pods", "10.0.0.0/33"), ("--pods", "10.0.0.0/33")),
    "pods of another family": (("ca", "init", "--dir", "x", "--pods", "fd00::/48"), ("--pods", "IPv4")),
    "pods of carrier-grade NATs": (
        ("ca", "init", "--dir", "x", "--pods", "100.64.0.0/12"),
        ("--pods: expected a network outside 100.64.0.0/10", "100.64.0.0/12"),
    ),
    "pods over the overlay": (
        ("ca", "init", "--dir", "x", "--pods", "10.0.0.0/8"),
        ("--overlay: expected a network apart from --pods 10.0.0.0/8, got 10.159.0.0/16",),
    ),
    "network6 too small": (
        ("ca", "init", "--dir", "x", "--network6", "fd00::/64"),
        ("--network6", "shorter than /64"),
    ),
    "name with capitals": (
        ("node", "init", "--name", "Edge", "--dir", "x"),
        ("--name: expected 1 to 63", "'Edge'"),
    ),
    "keys are missing": (
        ("node", "show", "--dir", "x"),
        ("x/signing.key: expected a CROSSEDGE SIGNING KEY",),
    ),
    "bundle is a request": (
        ("node", "join", "a/node.request", "--dir", "a", "--bundle", "a/node.bundle"),
        ("a/node.request: expected a bundle", "it is a CROSSEDGE REQUEST"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_and_status_2(name: str, authority: Run) -> None:
    arguments, parts = MISTAKES[name]
    result = authority(*arguments)
    assert result.status == 2
    lines = result.err.strip().splitlines()
    assert result.err.count("expected") >= 1
    for part in parts:
        assert part in lines[-1]
    assert not Path("x/ca.key").exists()


def test_key_file_that_others_may_read_is_refused(authority: Run) -> None:
    sign(authority, "a", "--rendezvous", RENDEZVOUS)
    Path("a/session.key").chmod(0o640)
    refused(join(authority, "a.bundle", "a"), "a/session.key", "SESSION KEY", "0640")
    Path("ca/ca.key").chmod(0o604)
    refused(authority("ca", "sign", "a/node.request", "--dir", "ca"), "ca/ca.key", "CA KEY", "0604")


def test_bundle_of_another_node_or_network_is_refused(authority: Run) -> None:
    run = authority
    sign(run, "a", "--rendezvous", RENDEZVOUS)
    sign(run, "b")
    refused(join(run, "b.bundle", "a"), "b.bundle: expected a bundle for the keys in a", "edge-b")
    good(join(run, "a.bundle", "a"))
    good(run("ca", "init", "--dir", "other"))
    good(
        run(
            "ca", "sign", "a/node.request", "--dir", "other", "--rendezvous", RENDEZVOUS, "-o", "other.bundle"
        )
    )
    refused(join(run, "other.bundle", "a"), "other.bundle: expected a bundle of network")


def test_older_bundle_does_not_replace_a_newer_one(authority: Run) -> None:
    run = authority
    sign(run, "a", "--rendezvous", RENDEZVOUS)
    Path("a.bundle").rename("old.bundle")
    sign(run, "a")
    good(join(run, "a.bundle", "a"))
    refused(join(run, "old.bundle", "a"), "old.bundle: expected a certificate above serial 2, got 1")
    good(join(run, "a.bundle", "a"))


def test_forged_bundle_is_refused(authority: Run) -> None:
    bundle = sign(authority, "a", "--rendezvous", RENDEZVOUS)
    forged = bytearray(bundle.encode())
    forged[-70] ^= 1
    body = b64encode(bytes(forged)).decode()
    Path("forged").write_text(
        "-----BEGIN CROSSEDGE BUNDLE-----\n" + body + "\n-----END CROSSEDGE BUNDLE-----\n"
    )
    refused(join(authority, "forged", "a"), "forged: expected a bundle")


def test_two_names_cannot_share_keys(authority: Run) -> None:
    sign(authority, "a", "--rendezvous", RENDEZVOUS)
    good(authority("node", "init", "--name", "edge-z", "--dir", "a"))
    refused(authority("ca", "sign", "a/node.request", "--dir", "ca"), "keys of its own for edge-z", "edge-a")


def test_damaged_state_is_named(authority: Run) -> None:
    Path("ca/state.json").write_text('{"version": 1, "network": 5}')
    refused(
        authority("ca", "show", "--dir", "ca"), "ca/state.json: network: expected what crossedge ca wrote"
    )
    Path("ca/state.json").write_text("{")
    refused(authority("ca", "show", "--dir", "ca"), "ca/state.json: expected what crossedge ca wrote")


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


def prefix(text: str) -> IPv4Network:
    return IPv4Network(text)


@pytest.mark.parametrize(
    ("taken", "free"),
    [
        ([], "10.0.0.0/24"),
        (["10.0.0.0/24"], "10.0.1.0/24"),
        (["10.0.1.0/24"], "10.0.0.0/24"),
        (["10.0.0.7/32"], "10.0.1.0/24"),
        (["10.0.0.0/24", "10.0.2.0/24"], "10.0.1.0/24"),
        (["10.0.0.0/23", "10.0.0.0/25", "10.0.2.9/32"], "10.0.3.0/24"),
        (["9.0.0.0/8", "11.0.0.0/8"], "10.0.0.0/24"),
        (["8.0.0.0/5"], None),
        (["10.0.0.0/23", "10.0.2.0/23"], None),
    ],
)
def test_lowest_free_prefix_is_found(taken: list[str], free: str | None) -> None:
    found = free_prefix(prefix("10.0.0.0/22"), 24, [prefix(text) for text in taken])
    assert found == (None if free is None else prefix(free))
