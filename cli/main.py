"""The `crossedge` command: identities, the state of a node, the lab."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from pathlib import Path

import click

from crossedge.wire.errors import CrossedgeError

COMMANDS = {
    "ca": ("crossedge.cli.ca:ca", "Make and keep a network's certificate authority."),
    "node": ("crossedge.cli.node:node", "Make a node's keys and its request, take its bundle."),
    "status": (
        "crossedge.cli.status:status",
        "Say whether this node is well, and what is wrong if it is not.",
    ),
    "peers": ("crossedge.cli.status:peers", "List the peers: path, round-trip time, loss, traffic."),
    "latency": ("crossedge.cli.status:latency", "Show the measured latency to every peer."),
    "ping": ("crossedge.cli.status:ping", "Probe a peer through its encrypted path."),
    "netcheck": ("crossedge.cli.status:netcheck", "Say what kind of NAT this node is behind."),
    "routes": ("crossedge.cli.status:routes", "List the prefixes that go through the mesh."),
    "lab": ("crossedge.cli.lab:lab", "Build networks of namespaces, NATs and delays on this machine."),
}


class Commands(click.Group):
    """A group that imports a command when it is used, so that `crossedge status` does not load the lab."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which a new user needs them."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one command, imported now; None where there is no such one."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their one line, without importing any."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    show_default=True,
    help="Directory that stands before /etc, /var and /run, so that many nodes share one file system.",
)
@click.version_option(version("crossedge"), prog_name="crossedge")
@click.pass_context
def crossedge(ctx: click.Context, root: Path) -> None:
    """One encrypted pod network over nodes behind different NATs."""
    ctx.obj = root


def main() -> None:
    """Run the command; a mistake of the caller's is one line on stderr and exit status 2."""
    try:
        crossedge(prog_name="crossedge")
    except CrossedgeError as error:
        click.echo(f"crossedge: {error}", err=True)
        raise SystemExit(2) from error
