"""`crossedge node`: a node's own keys, its request, and the bundle that it gets back."""

from __future__ import annotations

import secrets
import socket
import time
from base64 import b64encode
from pathlib import Path

import click

from crossedge.cli.identityfiles import (
    day,
    make_directory,
    read_file,
    read_key,
    under_root,
    unusable,
    write_file,
)
from crossedge.cli.tables import echo_json
from crossedge.wire.bundle import Bundle
from crossedge.wire.certificate import Request
from crossedge.wire.envelope import ControlKey
from crossedge.wire.errors import ConfigError, WireError
from crossedge.wire.identity import NAME_RULE, SigningKey, is_name
from crossedge.wire.keyfiles import BUNDLE_FILE, REQUEST_FILE, SESSION_FILE, SIGNING_FILE, KeyKind, format_key

DEFAULT_DIRECTORY = Path("var/lib/crossedge/meshd")
DEFAULT_BUNDLE = Path("etc/crossedge") / BUNDLE_FILE

directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the node's private keys.  [default: /var/lib/crossedge/meshd]",
)
bundle_option = click.option(
    "--bundle",
    "installed",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the daemon looks for the bundle.  [default: /etc/crossedge/node.bundle]",
)


@click.group()
def node() -> None:
    """Make a node's keys and its request, take its bundle."""


@node.command()
@click.option("--name", help="What the node is called, as Kubernetes does.  [default: the host name]")
@directory_option
@click.option("--new-keys", is_flag=True, help="Make new keys where there are some; needs a new bundle.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for the request too; - for standard output alone.",
)
def init(name: str | None, directory: Path | None, new_keys: bool, output: Path | None) -> None:
    """Make this node's private keys, which never leave it, and a request for `crossedge ca sign`.

    Keys that are there are kept, so that it can be run again for a new request.
    """
    if name is None:
        name = socket.gethostname().lower()
    if not is_name(name):
        raise ConfigError("crossedge node init", "--name", f"{NAME_RULE}, got {name!r}")
    path = under_root(directory, DEFAULT_DIRECTORY)
    make_directory(path)
    signing = SigningKey(_key(path / SIGNING_FILE, KeyKind.SIGNING, new_keys))
    session = ControlKey(_key(path / SESSION_FILE, KeyKind.SESSION, new_keys))
    request = Request(name=name, x25519=session.public, ed25519=signing.public, issued=int(time.time())).sign(
        signing
    )
    written = path / REQUEST_FILE
    write_file(written, request.to_text())
    if output is not None:
        write_file(output, request.to_text())
    click.echo(f"node      {name}", err=True)
    click.echo(f"keys in   {path}", err=True)
    click.echo(f"request   {written if output is None or str(output) == '-' else output}", err=True)


@node.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@directory_option
@bundle_option
def join(bundle: Path, directory: Path | None, installed: Path | None) -> None:
    """Check the BUNDLE that `crossedge ca sign` made for this node, and put it where the daemon looks."""
    path = under_root(directory, DEFAULT_DIRECTORY)
    target = under_root(installed, DEFAULT_BUNDLE)
    taken = _read_bundle(bundle)
    check_bundle_keys(bundle, taken, path)
    if target.exists():
        _check_successor(bundle, taken, _read_bundle(target))
    make_directory(target.parent, 0o755)
    write_file(target, taken.to_text())
    _describe(taken)
    click.echo(f"bundle in   {target}")


@node.command()
@directory_option
@bundle_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(directory: Path | None, installed: Path | None, as_json: bool) -> None:
    """Show this node's keys and, where it has joined, what its bundle says."""
    path = under_root(directory, DEFAULT_DIRECTORY)
    signing, session = _public_keys(path)
    target = under_root(installed, DEFAULT_BUNDLE)
    held = _read_bundle(target) if target.exists() else None
    if held is not None:
        check_bundle_keys(target, held, path)
    if as_json:
        echo_json(
            {
                "keys": str(path),
                "session_key": b64encode(session).decode(),
                "signing_key": b64encode(signing).decode(),
                "bundle": None if held is None else _summary(held),
            }
        )
        return
    click.echo(f"keys in     {path}")
    click.echo(f"session     {b64encode(session).decode()}")
    click.echo(f"signing     {b64encode(signing).decode()}")
    if held is None:
        click.echo(f"no bundle   {target} is missing; crossedge node join takes one")
    else:
        _describe(held)


def check_bundle_keys(file: Path, bundle: Bundle, directory: Path) -> None:
    """Refuse a bundle for other keys than those in `directory`; `ConfigError` names the file."""
    signing, session = _public_keys(directory)
    certificate = bundle.certificate
    if (certificate.ed25519, certificate.x25519) != (signing, session):
        raise ConfigError(
            file, "", f"a bundle for the keys in {directory}; this one is for {certificate.name}'s"
        )


def _key(path: Path, kind: KeyKind, new: bool) -> bytes:
    if path.exists() and not new:
        return read_key(path, kind)
    private = secrets.token_bytes(32)
    write_file(path, format_key(kind, private), 0o600)
    return private


def _public_keys(directory: Path) -> tuple[bytes, bytes]:
    signing = SigningKey(read_key(directory / SIGNING_FILE, KeyKind.SIGNING))
    session = ControlKey(read_key(directory / SESSION_FILE, KeyKind.SESSION))
    return signing.public, session.public


def _read_bundle(path: Path) -> Bundle:
    what = "a bundle, made by crossedge ca sign"
    try:
        bundle = Bundle.from_text(read_file(path, what))
        bundle.verify()
    except WireError as error:
        raise unusable(path, what, error) from error
    return bundle


def _check_successor(file: Path, taken: Bundle, held: Bundle) -> None:
    if taken.ca != held.ca:
        raise ConfigError(
            file,
            "",
            f"a bundle of network {held.network.hex()}, which this node is in, got one of "
            f"{taken.network.hex()}; remove the old bundle to change networks",
        )
    if taken.certificate.supersedes(held.certificate) or taken.certificate == held.certificate:
        return
    if taken.certificate.node_id != held.certificate.node_id:
        return
    raise ConfigError(
        file,
        "",
        f"a certificate above serial {held.certificate.serial}, got {taken.certificate.serial}",
    )


def _summary(bundle: Bundle) -> dict[str, object]:
    certificate = bundle.certificate
    return {
        "network": bundle.network.hex(),
        "ca": b64encode(bundle.ca).decode(),
        "name": certificate.name,
        "node_id": certificate.node_id.hex(),
        "serial": certificate.serial,
        "prefixes": [str(prefix) for prefix in certificate.prefixes],
        "overlay": [str(address) for address in (certificate.overlay4, certificate.overlay6) if address],
        "groups": list(certificate.groups),
        "roles": list(certificate.roles),
        "not_before": certificate.not_before,
        "not_after": certificate.not_after,
        "valid": certificate.valid_at(time.time()),
        "revoked": bundle.blocklist.revokes(certificate),
        "blocklist": {"serial": bundle.blocklist.serial, "issued": bundle.blocklist.issued},
        "rendezvous": [str(address) for address in bundle.rendezvous],
        "supernets": [str(network) for network in bundle.supernets],
    }


def _describe(bundle: Bundle) -> None:
    summary = _summary(bundle)
    certificate = bundle.certificate

    def listed(key: str) -> str:
        values = summary[key]
        return ", ".join(values) if isinstance(values, list) and values else "-"

    click.echo(f"node        {certificate.name}")
    click.echo(f"network     {summary['network']}")
    click.echo(f"pods        {listed('prefixes')}")
    click.echo(f"overlay     {listed('overlay')}")
    click.echo(f"groups      {listed('groups')}")
    click.echo(f"roles       {listed('roles')}")
    state = "revoked" if summary["revoked"] else "valid" if summary["valid"] else "not valid now"
    click.echo(f"serial      {certificate.serial}, {state}, until {day(certificate.not_after)}")
    click.echo(f"blocklist   {bundle.blocklist.serial}, issued {day(bundle.blocklist.issued)}")
    click.echo(f"rendezvous  {listed('rendezvous')}")
