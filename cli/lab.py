"""`crossedge lab`: networks of namespaces, NATs and delays on this machine, and the demo."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import click

from crossedge.cli.tables import echo_json, table
from crossedge.lab import launch, supervisor
from crossedge.lab.natkinds import KINDS
from crossedge.lab.network import Network
from crossedge.lab.topology import KERNEL_NATS, load_topology, named_topologies

DIRECTORY = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Directory whose lab is meant; one can be up for each. Nothing is written there.  [default: here]",
)


@click.group()
def lab() -> None:
    """Build networks of namespaces, NATs and delays on this machine.

    A lab lives in namespaces of its own, with or without root, and is gone when its process ends.
    """


@lab.command()
@click.argument("topology", required=False)
@DIRECTORY
@click.option("--background", "-b", is_flag=True, help="Return when it is up; `lab down` ends it.")
@click.option("--silent", is_flag=True, hidden=True, help="Print nothing once it is up: nobody reads on.")
@click.option("--seed", default=1, show_default=True, help="Seed of loss, jitter and random ports.")
@click.option(
    "--list", "show", is_flag=True, help="List the topologies that come with the lab, and the NATs."
)
def up(topology: str | None, directory: Path, background: bool, silent: bool, seed: int, show: bool) -> None:
    """Build TOPOLOGY (a .toml file, or the name of one that comes with the lab) and hold it until Ctrl-C."""
    if show:
        _show_known()
        return
    if topology is None:
        raise click.UsageError("name a topology (crossedge lab up --list shows those that there are)")
    plan = load_topology(topology)
    if launch.inside():
        launch.settle([node.name for node in plan.node])
        with Network(plan, seed) as network:
            holder = supervisor.Supervisor(network, supervisor.inherited_listener())
            nodes = ", ".join(network.nodes)
            click.echo(f"lab {plan.name} is up: {nodes}")
            if silent:
                _fall_silent()
            click.echo("crossedge lab exec NODE -- COMMAND runs in it; Ctrl-C or crossedge lab down ends it")
            sys.stdout.flush()
            try:
                holder.serve()
            except KeyboardInterrupt:
                click.echo("")
        return
    arguments = ["lab", "up", topology, "--dir", str(directory), "--seed", str(seed)]
    if background:
        _start_in_background([*arguments, "--silent"])
        return
    if silent:
        arguments.append("--silent")
    with launch.bind(directory) as listener:
        raise SystemExit(launch.launch(arguments, listener))


def _fall_silent() -> None:
    """Send what is printed from now on nowhere, where the reader of our pipes has gone."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def _start_in_background(arguments: list[str]) -> None:
    """Start `crossedge lab up` apart from this terminal; return when it says that it is up."""
    with subprocess.Popen(
        [sys.executable, "-c", launch.AGAIN, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    ) as child:
        line = child.stdout.readline() if child.stdout else ""
        if not line:
            click.echo((child.stderr.read() if child.stderr else "").strip(), err=True)
            raise SystemExit(child.wait() or 1)
        click.echo(line.strip())
        child.returncode = 0  # it goes on; do not wait for it


def _show_known() -> None:
    rows: list[dict[str, object]] = []
    for name in named_topologies():
        plan = load_topology(name)
        rows.append(
            {
                "name": name,
                "regions": len(plan.region),
                "routers": len(plan.router),
                "nodes": len(plan.node),
            }
        )
    headings = {"name": "topology", "regions": "regions", "routers": "routers", "nodes": "nodes"}
    click.echo(table(rows, headings))
    nats = {**KERNEL_NATS, **{kind.name: kind.about for kind in KINDS.values() if kind.translates}}
    click.echo()
    click.echo(table([{"nat": n, "about": a} for n, a in nats.items()], {"nat": "NAT", "about": "about"}))


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@DIRECTORY
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(directory: Path, node: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in a NODE of the lab (or in a router, a region, a pod).

    Its files are those of this machine, but for /run; /run/lab/NODE is meant for --root.
    """
    connection, process = launch.connect(directory)
    connection.close()
    words = launch.enter_command(process, node, command)
    try:
        os.execvp(words[0], words)  # noqa: S606 - words of the caller's own
    except FileNotFoundError:
        raise launch.LabError("nsenter is not installed (Debian: apt-get install util-linux)") from None


@lab.command()
@DIRECTORY
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status(directory: Path, as_json: bool) -> None:
    """Show nodes, routers and wires of the lab, and what they counted."""
    connection, _ = launch.connect(directory)
    found = supervisor.ask(connection, "status")
    if not found.pop("ok", False):
        raise launch.LabError(found.get("error", "the lab gave no answer"))
    if as_json:
        echo_json(found)
        return
    click.echo(f"lab {found['name']}\n")
    nodes = {"name": "node", "region": "region", "nat": "NAT", "ipv4": "IPv4", "ipv6": "IPv6", "pods": "pods"}
    click.echo(table(found["nodes"], nodes))
    if found["routers"]:
        click.echo()
        routers = {"name": "router", "nat": "NAT", "outer": "outer", "lan": "LAN", "sessions": "sessions"}
        click.echo(table(found["routers"], routers))
    delayed = [_wire_row(wire) for wire in found["wires"] if wire["counts"]]
    if delayed:
        click.echo()
        wires = {"name": "wire", "conditions": "conditions", "packets": "packets", "dropped": "dropped"}
        click.echo(table(delayed, wires))


def _wire_row(wire: dict[str, object]) -> dict[str, object]:
    counts = wire.pop("counts")
    name = wire.pop("name")
    ends = list(counts.values()) if isinstance(counts, dict) else []
    return {
        "name": name,
        "conditions": ", ".join(f"{key} {value}" for key, value in wire.items()),
        "packets": sum(end.get("packets", 0) for end in ends),
        "dropped": sum(sum(end["dropped"].values()) for end in ends),
    }


@lab.command()
@DIRECTORY
def down(directory: Path) -> None:
    """End the lab; return when nothing of it is left."""
    connection, process = launch.connect(directory)
    descriptor = os.pidfd_open(process)
    try:
        supervisor.ask(connection, "down")
        select.select([descriptor], (), ())  # readable once it and all that it held are gone
    finally:
        os.close(descriptor)


@lab.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build"),
    show_default=True,
    help="Directory for demo.json and, under demo/, what the programs printed.",
)
def demo(output: Path) -> None:
    """Join six nodes behind five NATs, let every pod ping every pod, and check what is promised.

    Ends with exit status 0 if every line of its summary is kept, else 1. Ctrl-C leaves nothing running.
    """
    if launch.inside():
        from crossedge.lab.demo import main

        try:
            raise SystemExit(main(load_topology("demo"), output))
        except KeyboardInterrupt:
            click.echo("\nstopped; nothing is left behind")
            raise SystemExit(130) from None
    raise SystemExit(launch.launch(["lab", "demo", "--output", str(output)]))
