"""The `meshd` command: run the daemon, check what it would run with, remove every trace of it."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path

import click

from crossedge.meshd.config import CONFIG_FILE, MeshdConfig
from crossedge.meshd.identity import Identity, load_identity, load_preshared_key, read_config, under
from crossedge.wire.errors import CrossedgeError

CONFIG_OPTION = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Configuration file, TOML.  [default: {CONFIG_FILE}, where there is one]",
)
ROOT_OPTION = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    show_default=True,
    help="Directory that stands before every path, so that many nodes share one file system.",
)


def read(file: Path | None, root: Path) -> tuple[MeshdConfig, Identity, dict[str, bytes | None]]:
    """Return the checked configuration, the node's identity and the pre-shared keys of static peers by name.

    Raises:
        ConfigError: something in a file cannot be used; one line that names it.
    """
    config = read_config(file or under(root, CONFIG_FILE), required=file is not None)
    identity = load_identity(config, root)
    keys = {peer.name: load_preshared_key(peer, root) for peer in config.static_peer}
    return config, identity, keys


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("crossedge"), prog_name="meshd")
def meshd() -> None:
    """The crossedge daemon of an edge host: punches through NATs and carries the pods' packets."""


@meshd.command()
@CONFIG_OPTION
@ROOT_OPTION
@click.option("--check-config", is_flag=True, help="Check configuration and identity, and end.")
def run(file: Path | None, root: Path, check_config: bool) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT.

    Pods keep their routes when it stops; `meshd cleanup` removes everything.
    """
    config, identity, keys = read(file, root)
    if check_config:
        certificate = identity.bundle.certificate
        prefixes = ", ".join(str(prefix) for prefix in certificate.prefixes)
        servers = ", ".join(f"{server.host}:{server.port}" for server in identity.bundle.rendezvous)
        click.echo(f"good: node {identity.name}, pods {prefixes}, rendezvous {servers or 'none'}")
        return
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise click.ClickException("/dev/net/tun cannot be opened: run as root on a kernel with TUN")
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    import uvloop  # not needed to check a configuration

    from crossedge.meshd.daemon import Daemon

    uvloop.run(Daemon(config, identity, keys, root).run())


@meshd.command()
@CONFIG_OPTION
@ROOT_OPTION
def cleanup(file: Path | None, root: Path) -> None:
    """Remove the interface, routes, rules and tables of a daemon that does not run any more."""
    from crossedge.meshd.hostplan import remove_traces

    config = read_config(file or under(root, CONFIG_FILE), required=file is not None)
    try:
        removed = remove_traces(config, root)
    except OSError as error:
        raise click.ClickException(f"not everything could be removed: {error}") from error
    for line in removed:
        click.echo(line)


def main() -> None:
    """Run the command; bad input is one line on stderr and exit status 2."""
    try:
        meshd(prog_name="meshd")
    except CrossedgeError as error:
        click.echo(f"meshd: {error}", err=True)
        raise SystemExit(2) from error
