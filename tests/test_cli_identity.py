"""`crossedge ca` and `crossedge node`: from nothing to two joined nodes, revoked and moved ones."""

from __future__ import annotations

import json
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from click.testing import CliRunner

from crossedge.cli.allocation import free_prefix
from crossedge.cli.castate import load_state
from crossedge.cli.main import crossedge
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.bundle import Bundle
from crossedge.wire.certificate import Request
from crossedge.wire.keyfiles import KeyKind, parse_key
from tests.identity_commands import (
    RENDEZVOUS,
    SECOND,
    Run,
    good,
    join,
    new_authority,
    refused,
    runner,
    sign,
)

run = pytest.fixture(runner)
authority = pytest.fixture(new_authority)


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
