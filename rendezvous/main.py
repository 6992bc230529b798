"""`crossedge-rendezvous`: make its key, run it, ask the running one how it is."""

from __future__ import annotations

import asyncio
import base64
import binascii
import gc
import json
import logging
import os
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import uvloop

from crossedge.rendezvous.config import (
    CONFIG_FILE,
    DEFAULT_PORT,
    RendezvousConfig,
    load_config,
    parse_address,
    rooted,
)
from crossedge.rendezvous.control import ask
from crossedge.rendezvous.files import create_private, read_private, write_atomic
from crossedge.rendezvous.server import Server, notify_ready
from crossedge.wire.bundle import RendezvousAddress
from crossedge.wire.envelope import ControlKey
from crossedge.wire.errors import ConfigError, CrossedgeError, WireError
from crossedge.wire.keyfiles import KeyKind, format_key, load_key

COMMAND = "crossedge-rendezvous"
KEY_FILE = RendezvousConfig.model_fields["key_file"].default
SOCKET_FILE = RendezvousConfig.model_fields["control_socket"].default

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    default=CONFIG_FILE,
    show_default=True,
    help="Configuration file.",
)
root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    show_default=True,
    help="Directory that stands before every path, the configuration's too.",
)
address_option = click.option(
    "--address",
    default="",
    metavar="HOST[:PORT]",
    help="Where nodes reach this server.  [default: `address` of the configuration, or what is found]",
)


def load_control_key(path: Path) -> ControlKey:
    """Return the server's control key.

    Raises:
        ConfigError: the file cannot be read, others can read it too, or there is no such key in it.
    """
    what = f"a CROSSEDGE {KeyKind.RENDEZVOUS.value} ({COMMAND} init makes one)"
    return ControlKey(load_key(path, KeyKind.RENDEZVOUS, read_private(path, what)))


def key_path(config: RendezvousConfig, root: Path) -> Path:
    """Return where the key is: with the service manager's credentials if it is there, else as configured."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials is not None:
        handed_over = Path(credentials) / config.key_file.name
        if handed_over.exists():
            return handed_over
    return rooted(root, config.key_file)


def own_address() -> str:
    """Return an address that this host reaches others from, or its name where it has none."""
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect((elsewhere, 9))  # Sends nothing; the kernel chooses a route and so an address.
            except OSError:
                continue
            return str(sock.getsockname()[0])
    return socket.gethostname()


def public_name(config: RendezvousConfig | None, address: str, public_key: bytes) -> RendezvousAddress:
    """Return how nodes name this server; the address is what is given, configured, listened on or found.

    Raises:
        ConfigError: what is given is no address.
    """
    port = DEFAULT_PORT
    if config is not None:
        port = config.listen[0].port
        address = address or config.address
        named = [endpoint.host for endpoint in config.listen if endpoint.host not in ("0.0.0.0", "::")]
        if not address and named:
            address = config.public.get(named[0], named[0])
    try:
        return parse_address(address or own_address(), port, public_key)
    except WireError as error:
        raise ConfigError("--address", "", f"HOST or HOST:PORT, got {address!r:.60}") from error


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("crossedge"), prog_name=COMMAND)
def cli() -> None:
    """Where nodes behind NATs find each other. It is trusted with nothing."""


@cli.command()
@config_option
@root_option
@click.option("--check-config", is_flag=True, help="Say whether the configuration and the key can be used.")
def run(config_file: Path, root: Path, check_config: bool) -> None:
    """Run the server."""
    config = load_config(rooted(root, config_file.absolute()))
    key = load_control_key(key_path(config, root))
    if check_config:
        click.echo(f"{config_file} is fine: {public_name(config, '', key.public)}")
        return
    logging.basicConfig(
        stream=sys.stderr, level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s"
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, key, root))


async def serve(config: RendezvousConfig, key: ControlKey, root: Path) -> None:
    """Open the sockets and serve until a signal."""
    server = Server(config, key, root)
    listen = ", ".join(str(endpoint) for endpoint in server.endpoints)
    gc.freeze()

    def ready() -> None:
        logging.getLogger(COMMAND).info("listening on %s", listen)
        notify_ready()

    await server.run(ready)


@cli.command()
@config_option
@root_option
@address_option
@click.option(
    "--network", "networks", multiple=True, metavar="KEY", help="CA key of a network to serve; once for each."
)
def init(config_file: Path, root: Path, address: str, networks: tuple[str, ...]) -> None:
    """Make the server's key, and a configuration where there is none.

    Prints the HOST:PORT#KEY that `crossedge ca sign --rendezvous` wants.
    """
    file = rooted(root, config_file.absolute())
    for network in networks:
        _check_network(network)
    config = load_config(file) if file.exists() else None
    path = rooted(root, config.key_file if config is not None else KEY_FILE)
    key = ControlKey.generate(os.urandom)
    name = public_name(config, address, key.public)
    try:
        create_private(path, format_key(KeyKind.RENDEZVOUS, key.private).encode())
        if config is None:
            write_atomic(file, _first_config(address, name.port, networks).encode(), 0o644)
    except FileExistsError:
        raise ConfigError(path, "", f"no key yet; `{COMMAND} show` prints what nodes need") from None
    except OSError as error:
        where = Path(error.filename or path)
        raise ConfigError(where, "", f"to be able to write it ({error.strerror})") from error
    if config is not None:
        click.echo(f"left {file} as it is", err=True)
    elif networks:
        click.echo(f"wrote {file}", err=True)
    else:
        click.echo(f"wrote {file}: put the CA key of a network into `networks`", err=True)
    _print_name(config, address, key.public)


@cli.command()
@config_option
@root_option
@address_option
def show(config_file: Path, root: Path, address: str) -> None:
    """Print the HOST:PORT#KEY of this server."""
    file = rooted(root, config_file.absolute())
    config = load_config(file) if file.exists() else None
    path = key_path(config, root) if config is not None else rooted(root, KEY_FILE)
    _print_name(config, address, load_control_key(path).public)


@cli.command()
@config_option
@root_option
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def status(config_file: Path, root: Path, as_json: bool) -> None:
    """Say how the running server is."""
    file = rooted(root, config_file.absolute())
    path = rooted(root, load_config(file).control_socket if file.exists() else SOCKET_FILE)
    try:
        answer = ask(path, "status")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise click.ClickException(f"no server answers at {path} ({reason})") from error
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for line in _lines(answer):
        click.echo(line)


def _lines(answer: dict[str, Any]) -> list[str]:
    lines = [
        f"up {answer['uptime']:.0f} s, {answer['cpu_seconds']:.1f} s of CPU, "
        f"{answer['memory_bytes'] / 1e6:.0f} MB of memory",
        f"listening on {', '.join(listen['endpoint'] for listen in answer['listen'])}",
        f"{answer['leases']} nodes are here; keepalive every {answer['keepalive']:.0f} s",
    ]
    for network in answer["networks"]:
        serial = network["blocklist_serial"]
        age = network["blocklist_age"]
        blocklist = "no blocklist" if serial is None else f"blocklist {serial}, {age / 3600:.1f} h old"
        lines.append(f"network {network['id']}: {network['nodes']} nodes known, {blocklist}")
    relay = answer["relay"]
    lines.append(f"relay: {relay['channels']} channels, {relay.get('bytes', 0) / 1e6:.1f} MB forwarded")
    lines.append(
        f"STUN answers: {answer['stun_answered']}; cookies given: {answer['cookies']}; "
        f"key agreements: {answer['key_agreements']}"
    )
    for title in ("received", "refused", "dropped", "failed_sends"):
        counts = sorted(answer[title].items(), key=lambda item: -item[1])
        if counts:
            lines.append(
                f"{title.replace('_', ' ')}: " + ", ".join(f"{name} {count}" for name, count in counts)
            )
    return lines


def _check_network(text: str) -> None:
    try:
        valid = len(base64.b64decode(text, validate=True)) == 32
    except (binascii.Error, ValueError):
        valid = False
    if not valid:
        raise ConfigError("--network", "", f"base64 of a 32-byte CA key, got {text!r:.60}")


def _first_config(address: str, port: int, networks: tuple[str, ...]) -> str:
    lines = [f"address = {json.dumps(address)}"] if address else []
    if port != DEFAULT_PORT:
        lines.append(f'listen = ["0.0.0.0:{port}", "[::]:{port}"]')
    keys = "".join(f"  {json.dumps(network)},\n" for network in networks)
    return "\n".join([*lines, f"networks = [  # CA keys; crossedge ca show prints them\n{keys}]", ""])


def _print_name(config: RendezvousConfig | None, address: str, public_key: bytes) -> None:
    click.echo(str(public_name(config, address, public_key)))
    if not address and not (config is not None and config.address):
        click.echo("(say --address HOST if nodes reach this server at another)", err=True)


def main() -> None:
    """Run the command; a mistake in what the operator wrote is one line on stderr and exit status 2."""
    try:
        cli(prog_name=COMMAND)
    except CrossedgeError as error:
        click.echo(f"{COMMAND}: {error}", err=True)
        raise SystemExit(2) from error
