"""Mistakes with `crossedge ca` and `crossedge node`: one line each, and nothing is changed."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest

from tests.identity_commands import (
    RENDEZVOUS,
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
