"""The `crossedge-cni` command: installs the plugin, and shows and repairs what it keeps."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from crossedge.cni import install as installation
from crossedge.cni.commands import shown, sweep
from crossedge.cni.ipam import GONE, bounds
from crossedge.cni.local import make_host
from crossedge.cni.node import Node, Paths, read_node, write_node
from crossedge.cni.output import echo_json, table
from crossedge.cni.recovery import recover, vanished
from crossedge.cni.spec import CniError, mismatch
from crossedge.host.links import get_link
from crossedge.wire.bundle import Bundle
from crossedge.wire.errors import CrossedgeError

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
BUNDLE = Path("etc/crossedge/node.bundle")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    show_default=True,
    help="Directory that stands before /etc, /opt, /var and /run.",
)
@click.pass_context
def cni(ctx: click.Context, root: Path) -> None:
    """Install the CNI plugin, and look after the addresses of this node's pods."""
    ctx.obj = Paths(root.absolute())


@cni.command()
@click.option("--bundle", type=click.Path(path_type=Path, dir_okay=False), help="Bundle with the prefixes.")
@click.option(
    "--pod-cidr",
    "pod_cidrs",
    multiple=True,
    metavar="PREFIX",
    help="What Kubernetes believes (Node.spec.podCIDRs); refused unless the certificate has it. Repeatable.",
)
@click.option("--no-portmap", is_flag=True, help="Leave portmap out of the chain.")
@click.option("--now", is_flag=True, help="Write the configuration though meshd is not ready.")
@as_json
@click.pass_obj
def install(
    paths: Paths,
    bundle: Path | None,
    pod_cidrs: tuple[str, ...],
    no_portmap: bool,
    now: bool,
    as_json: bool,
) -> None:
    """Put the plugin and its configuration where container runtimes look for them.

    Runtimes take a node that has the configuration for ready. Where meshd is not, the configuration is
    prepared, and meshd brings it to its place as soon as it can serve pods.
    """
    file = bundle or paths.root / BUNDLE
    try:
        found = Bundle.from_text(file.read_bytes())
        found.verify()
    except FileNotFoundError:
        raise click.ClickException(f"{file} is missing: the node must have joined a network first") from None
    except CrossedgeError as error:
        raise click.ClickException(f"{file}: {error}") from error
    prefixes = found.certificate.prefixes
    if not prefixes:
        raise click.ClickException(f"{file}: the certificate of {found.certificate.name} has no pod prefix")
    for text in pod_cidrs:
        if text not in map(str, prefixes):
            raise click.ClickException(f"podCIDR {text} is no pod prefix of this node; {mismatch(prefixes)}")
    try:
        node = replace(read_node(paths), prefixes=prefixes)  # the rest is as the daemon said
    except CniError:
        node = Node(prefixes)
    write_node(paths, node)
    written = installation.install(paths, portmap=not no_portmap, ready=now)
    if paths.prepared in written and installation.is_ready(paths) and installation.publish(paths):
        written[-1] = paths.conflist
    plugins = Path("/usr/lib/cni/portmap"), paths.binary.with_name("portmap")
    missing = not no_portmap and not any(path.exists() for path in plugins)
    if as_json:
        echo_json(
            {"written": written, "prefixes": [str(prefix) for prefix in prefixes], "portmap": not missing}
        )
        return
    for path in written:
        click.echo(f"wrote {path}")
    if paths.prepared in written:
        click.echo(f"meshd is not ready; when it is, it writes {paths.conflist}")
    if missing:
        click.echo("portmap is not installed (Debian: apt-get install containernetworking-plugins)", err=True)


@cni.command()
@as_json
@click.pass_obj
def uninstall(paths: Paths, as_json: bool) -> None:
    """Remove the plugin, its configuration and, once no pod has an address, what it keeps of them."""
    with ExitStack() as stack:
        live = len(make_host(stack, paths).store.look().live) if paths.state.exists() else 0
    removed = installation.uninstall(paths, state=not live)
    if as_json:
        echo_json({"removed": removed, "attachments": live})
        return
    for path in removed:
        click.echo(f"removed {path}")
    if live:
        click.echo(
            f"kept {paths.state}: pods of {live} attachments have addresses; uninstall again without them"
        )
    elif not removed:
        click.echo("nothing to remove")


@cni.command()
@as_json
@click.pass_obj
def ips(paths: Paths, as_json: bool) -> None:
    """List the addresses that are in use, or cool down before they are given out again."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        if paths.state.exists():
            with make_host(stack, paths).store.transaction() as change:
                change.ledger.expire(change.now)
                rows = [shown(entry) for entry in change.ledger.entries.values()]
    if as_json:
        echo_json(rows)
        return
    columns = {
        "addresses": "ADDRESSES",
        "state": "STATE",
        "container": "CONTAINER",
        "interface": "INTERFACE",
        "pod": "POD",
        "link": "LINK",
    }
    click.echo(table(rows, columns) if rows else "none")


@cni.command()
@as_json
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Compare what is kept with the kernel; exit status 1 where something is wrong."""
    with ExitStack() as stack:
        host = make_host(stack, ctx.obj)
        problems = [*_installation_problems(ctx.obj)]
        live = host.store.look().live.values() if ctx.obj.state.exists() else ()
        for entry in live:
            name = f"{entry.container}/{entry.interface}"
            if vanished(entry, host.netlink()):
                problems.append(f"{name} is gone and still has {', '.join(map(str, entry.addresses))}")
            elif get_link(host.netlink(), entry.host) is None:
                problems.append(f"{name} has lost its link {entry.host}")
    _say(problems, "all is well", "problems", as_json)
    if problems:
        ctx.exit(1)


def _installation_problems(paths: Paths) -> Iterable[str]:
    for path in (paths.binary, paths.conflist):
        if path.exists():
            continue
        if path == paths.conflist and paths.prepared.exists():
            yield f"{path} waits for meshd to be ready"
        else:
            yield f"{path} is missing: crossedge-cni install writes it"
    if paths.binary.exists() and not installation.is_current(paths):
        yield f"{paths.binary} is of another version: crossedge-cni install renews it"
    try:
        prefixes = read_node(paths).prefixes
    except CniError as error:
        yield f"{error.message}: {error.details}" if error.details else error.message
        prefixes = ()
    for prefix in prefixes:
        first, last = bounds(prefix)
        if last < first:
            yield f"prefix {prefix} has no address for a pod"
    if shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
        yield "nft is not installed (Debian: apt-get install nftables)"


@cni.command()
@as_json
@click.pass_obj
def gc(paths: Paths, as_json: bool) -> None:
    """Free what crashes left: addresses of pods that are gone (seen twice), links that nobody has."""
    with ExitStack() as stack:
        host = make_host(stack, paths)
        freed = [shown(entry) for entry in recover(host.store, host.netlink())]
        links = sweep(host)
        left = [entry for entry in host.store.look().live.values() if entry.suspect and entry.state != GONE]
        host.store.sync()
    found: dict[str, Any] = {"freed": freed, "links": links, "suspects": [shown(entry) for entry in left]}
    if as_json:
        echo_json(found)
        return
    for row in freed:
        click.echo(f"freed {', '.join(row['addresses'])} of {row['container']}/{row['interface']}")
    for name in links:
        click.echo(f"deleted link {name}")
    for row in found["suspects"]:
        click.echo(f"{row['container']}/{row['interface']} seems gone; it is freed if it still is in 10 s")
    if not any(found.values()):
        click.echo("nothing to free")


def _say(lines: list[str], none: str, label: str, as_json: bool) -> None:
    if as_json:
        echo_json({label: lines})
        return
    for line in lines or [none]:
        click.echo(line)


def main() -> None:
    """Run the command; a mistake of the caller's is one line on stderr."""
    try:
        cni(prog_name="crossedge-cni")
    except (CniError, CrossedgeError) as error:
        details = error.details if isinstance(error, CniError) else ""
        click.echo(f"crossedge-cni: {error}" + (f": {details}" if details else ""), err=True)
        raise SystemExit(2) from error
    except OSError as error:
        click.echo(f"crossedge-cni: {error}", err=True)
        raise SystemExit(1) from error
