"""`crossedge ca`: a network's certificate authority, kept offline."""

from __future__ import annotations

import secrets
import time
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

import click

from crossedge.cli.castate import (
    BLOCKLIST_FILE,
    CertificateAuthority,
    Supernets,
    Wishes,
    default_network6,
    load_state,
)
from crossedge.cli.identityfiles import day, read_file, read_key, under_root, unusable, write_file
from crossedge.cli.tables import echo_json, table
from crossedge.wire.blocklist import Blocklist, Delegation
from crossedge.wire.bundle import RendezvousAddress
from crossedge.wire.certificate import ROLES, Request
from crossedge.wire.errors import ConfigError, WireError
from crossedge.wire.identity import LABEL_RULE, SigningKey, is_label, is_name
from crossedge.wire.keyfiles import KeyKind, format_key

DEFAULT_DIRECTORY = Path("var/lib/crossedge/ca")
SECONDS_PER_DAY = 86400


class NetworkType(click.ParamType[IPv4Network | IPv6Network]):
    """A prefix, its host bits zero; of one family where that is asked for."""

    name = "prefix"

    def __init__(self, version: int | None = None) -> None:
        self.version = version

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the network that a text names; `ConfigError` names the option."""
        if isinstance(value, (IPv4Network, IPv6Network)):
            return value
        file = ctx.command_path if ctx else "crossedge ca"
        key = param.opts[0] if param else "prefix"
        try:
            network = ip_network(value)
        except ValueError as error:
            raise ConfigError(file, key, f"a prefix such as 10.160.0.0/12; {error}") from error
        if self.version not in (None, network.version):
            raise ConfigError(file, key, f"an IPv{self.version} prefix, got {network}")
        return network


directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="State directory of the authority.  [default: /var/lib/crossedge/ca]",
)


@click.group()
def ca() -> None:
    """Make and keep a network's certificate authority."""


@ca.command()
@directory_option
@click.option(
    "--pods",
    type=NetworkType(4),
    default="10.160.0.0/12",
    show_default=True,
    help="What nodes' IPv4 pod prefixes are taken from.",
)
@click.option(
    "--pods-length",
    type=click.IntRange(8, 30),
    default=24,
    show_default=True,
    help="Prefix length of one node's IPv4 pods.",
)
@click.option(
    "--overlay",
    type=NetworkType(4),
    default="10.159.0.0/16",
    show_default=True,
    help="What nodes' own IPv4 addresses in the mesh are taken from.",
)
@click.option(
    "--network6",
    "--pods6",
    "network6",
    type=NetworkType(6),
    help="What all IPv6 addresses are taken from, a /64 per node.  [default: fd + network id, a /48]",
)
def init(
    directory: Path | None,
    pods: IPv4Network,
    pods_length: int,
    overlay: IPv4Network,
    network6: IPv6Network | None,
) -> None:
    """Make a network: its key, and the plan of its addresses.

    The key stays in the state directory, which is best kept offline and backed up: whoever has it can add
    nodes.
    """

    def plan(public: bytes) -> Supernets:
        return Supernets(
            pods=pods,
            pods_length=pods_length,
            overlay=overlay,
            network6=network6 or default_network6(public),
        )

    path = under_root(directory, DEFAULT_DIRECTORY)
    authority = CertificateAuthority.create(path, secrets.token_bytes, plan, int(time.time()))
    state = authority.state
    click.echo(f"network   {state.network}")
    click.echo(f"ca key    {state.ca}")
    click.echo(f"pods      {state.supernets.pods}, a /{state.supernets.pods_length} per node")
    click.echo(f"overlay   {state.supernets.overlay}")
    click.echo(f"ipv6      {state.supernets.network6}, a /64 per node")
    click.echo(f"kept in   {path}")


@ca.command()
@click.argument("request", type=click.Path(path_type=Path))
@directory_option
@click.option(
    "--rendezvous",
    multiple=True,
    metavar="HOST:PORT#KEY",
    help="Where nodes meet; once for each. Without it: those of the last bundle.",
)
@click.option("--group", "groups", multiple=True, help="Group of the node; once for each.")
@click.option("--no-groups", is_flag=True, help="Leave the groups that the name had before.")
@click.option(
    "--role", "roles", multiple=True, type=click.Choice(ROLES), help="What the key may do; once for each."
)
@click.option(
    "--prefix", "prefixes", multiple=True, type=NetworkType(), help="Pod prefix, in place of the next free."
)
@click.option(
    "--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="How long it holds."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="-",
    help="File for the bundle.  [default: standard output]",
)
def sign(
    request: Path,
    directory: Path | None,
    rendezvous: tuple[str, ...],
    groups: tuple[str, ...],
    no_groups: bool,
    roles: tuple[str, ...],
    prefixes: tuple[IPv4Network | IPv6Network, ...],
    days: int,
    output: Path,
) -> None:
    """Sign a node's REQUEST and write its bundle: all that the node needs.

    A name that was signed before keeps its prefixes, addresses, groups and roles, and its serial rises; its
    older certificates give way.
    """
    if groups and no_groups:
        raise click.UsageError("expected --group or --no-groups, got both")
    for group in groups:
        if not is_label(group):
            raise ConfigError("crossedge ca sign", "--group", f"{LABEL_RULE}, got {group!r}")
    wishes = Wishes(
        rendezvous=tuple(str(_rendezvous(text)) for text in rendezvous) or None,
        groups=() if no_groups else tuple(dict.fromkeys(groups)) or None,
        roles=tuple(dict.fromkeys(roles)) or None,
        prefixes=prefixes,
        days=days,
    )
    asked = _read_request(request)
    with CertificateAuthority.open(under_root(directory, DEFAULT_DIRECTORY)) as authority:
        held = authority.state.nodes.get(asked.name)
        before = authority.state.blocklist.serial
        bundle = authority.sign(asked, wishes, int(time.time()))
    write_file(output, bundle.to_text())
    certificate = bundle.certificate
    given = ", ".join(str(prefix) for prefix in certificate.prefixes)
    replaced = "" if held is None else f", replaces serial {held.serial}"
    if bundle.blocklist.serial != before:
        replaced += f", which blocklist {bundle.blocklist.serial} revokes"
    click.echo(f"signed {certificate.name}: serial {certificate.serial}{replaced}", err=True)
    click.echo(f"  pods {given}; overlay {certificate.overlay4}, {certificate.overlay6}", err=True)
    click.echo(f"  until {day(certificate.not_after)}", err=True)


@ca.command()
@click.argument("name", required=False)
@directory_option
@click.option("--merge", type=click.Path(path_type=Path), help="Blocklist by a revoke-only key, to take up.")
@click.option(
    "--key", type=click.Path(path_type=Path), help="Revoke-only key to sign with, away from the authority."
)
@click.option(
    "--list", "blocklist", type=click.Path(path_type=Path), help="With --key: newest blocklist, written anew."
)
@click.option("--serial", type=click.IntRange(0, 2**64 - 2), help="With --key: highest serial to revoke.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for the blocklist too (always in the state directory).",
)
def revoke(
    name: str | None,
    directory: Path | None,
    merge: Path | None,
    key: Path | None,
    blocklist: Path | None,
    serial: int | None,
    output: Path | None,
) -> None:
    """Revoke all certificates that NAME has, and write the blocklist to hand to a rendezvous.

    A certificate that is signed for the name afterwards holds. With --key it needs no state directory.
    """
    now = int(time.time())
    if key is not None:
        if name is None or blocklist is None or serial is None or merge is not None:
            raise click.UsageError("expected NAME, --list and --serial with --key")
        signed = _revoke_with_key(name, key, blocklist, serial, now)
        write_file(output or blocklist, signed.to_text())
        click.echo(f"blocklist {signed.serial}: {len(signed.revoked)} names", err=True)
        return
    if name is None and merge is None:
        raise click.UsageError("expected NAME or --merge")
    path = under_root(directory, DEFAULT_DIRECTORY)
    with CertificateAuthority.open(path) as authority:
        if merge is not None:
            other = _read_blocklist(merge)
            try:
                signed = authority.merge(other, now)
            except WireError as error:
                raise unusable(merge, f"a blocklist of network {authority.state.network}", error) from error
        if name is not None:
            signed = authority.revoke(name, now)
    if output is not None:
        write_file(output, signed.to_text())
    click.echo(
        f"blocklist {signed.serial}: {len(signed.revoked)} names, in {path / BLOCKLIST_FILE}", err=True
    )


@ca.command()
@directory_option
@click.option(
    "--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="How long it holds."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File for the new private key and the authority's word for it.",
)
def delegate(directory: Path | None, days: int, output: Path) -> None:
    """Make a key that may revoke and do nothing else, so that it can be kept online."""
    key = SigningKey.generate(secrets.token_bytes)
    with CertificateAuthority.open(under_root(directory, DEFAULT_DIRECTORY)) as authority:
        delegation = authority.delegate(key.public, days, int(time.time()))
    write_file(output, format_key(KeyKind.REVOKE, key.seed) + delegation.to_text(), 0o600)
    click.echo(f"may revoke until {day(delegation.not_after)}: {output}", err=True)


@ca.command()
@directory_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(directory: Path | None, as_json: bool) -> None:
    """Show the network and every node that was signed."""
    state = load_state(under_root(directory, DEFAULT_DIRECTORY))
    now = time.time()
    rows: list[dict[str, object]] = []
    for name, entry in sorted(state.nodes.items()):
        revoked = entry.serial < state.blocklist.revoked.get(name, 0)
        rows.append(
            {
                "name": name,
                "serial": entry.serial,
                "prefixes": [str(prefix) for prefix in entry.prefixes],
                "overlay": [str(entry.overlay4), str(entry.overlay6)],
                "groups": list(entry.groups),
                "roles": list(entry.roles),
                "not_after": entry.not_after,
                "until": day(entry.not_after),
                "state": "revoked" if revoked else "expired" if now > entry.not_after else "valid",
            }
        )
    supernets = state.supernets
    if as_json:
        echo_json(
            {
                "network": state.network,
                "ca": state.ca,
                "pods": str(supernets.pods),
                "pods_length": supernets.pods_length,
                "overlay": str(supernets.overlay),
                "network6": str(supernets.network6),
                "serial": state.serial,
                "rendezvous": list(state.rendezvous),
                "blocklist": {
                    "serial": state.blocklist.serial,
                    "issued": state.blocklist.issued,
                    "revoked": state.blocklist.revoked,
                },
                "nodes": rows,
            }
        )
        return
    age = max(0, int(now) - state.blocklist.issued) // SECONDS_PER_DAY
    click.echo(f"network     {state.network}")
    click.echo(f"ca key      {state.ca}")
    click.echo(f"pods        {supernets.pods}, a /{supernets.pods_length} per node")
    click.echo(f"overlay     {supernets.overlay}")
    click.echo(f"ipv6        {supernets.network6}, a /64 per node")
    click.echo(f"rendezvous  {', '.join(state.rendezvous) or '-'}")
    click.echo(f"blocklist   {state.blocklist.serial}, {len(state.blocklist.revoked)} names, {age} days old")
    click.echo()
    columns = {
        "name": "NODE",
        "serial": "SERIAL",
        "state": "STATE",
        "prefixes": "PODS",
        "overlay": "OVERLAY",
        "groups": "GROUPS",
        "roles": "ROLES",
        "until": "UNTIL",
    }
    click.echo(table(rows, columns) if rows else "no node was signed yet")


def _rendezvous(text: str) -> RendezvousAddress:
    try:
        return RendezvousAddress.parse(text)
    except WireError as error:
        raise ConfigError("crossedge ca sign", "--rendezvous", f"{error.detail}, got {text!r}") from error


def _read_request(path: Path) -> Request:
    what = "a request, made by crossedge node init"
    try:
        request = Request.from_text(read_file(path, what))
        request.verify()
    except WireError as error:
        raise unusable(path, what, error) from error
    return request


def _read_blocklist(path: Path) -> Blocklist:
    what = "a blocklist, made by crossedge ca revoke"
    try:
        return Blocklist.from_text(read_file(path, what))
    except WireError as error:
        raise unusable(path, what, error) from error


def _revoke_with_key(name: str, key_file: Path, list_file: Path, serial: int, now: int) -> Blocklist:
    if not is_name(name):
        raise ConfigError("crossedge ca revoke", "NAME", f"the name of a node, got {name!r}")
    key = SigningKey(read_key(key_file, KeyKind.REVOKE))
    held = _read_blocklist(list_file)
    try:
        delegation = Delegation.from_text(read_file(key_file, "a revoke-only key"))
    except WireError as error:
        raise unusable(key_file, "a revoke-only key with its delegation", error) from error
    if delegation.key != key.public or delegation.network != held.network:
        raise ConfigError(key_file, "", f"the delegation of this key for the network of {list_file}")
    signed = Blocklist(
        network=held.network,
        serial=held.serial + 1,
        issued=now,
        revoked={**held.revoked, name: max(serial + 1, held.revoked.get(name, 0))},
        delegation=delegation.encode(),
    )
    if signed.serial > delegation.last_serial or not delegation.not_before <= now <= delegation.not_after:
        raise ConfigError(key_file, "", "a delegation that still holds; ask the authority for a new one")
    return signed.sign(key)
