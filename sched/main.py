"""The `crossedge-sched` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

import crossedge.sched.onethread  # noqa: F401  # before numpy is there
from crossedge.sched.files import read_matrix
from crossedge.sched.replay import Replay, Replayer, silent
from crossedge.wire.errors import CrossedgeError

SUFFIXES = (".gz", ".csv", ".tsv", ".txt", ".npz")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("crossedge"), prog_name="crossedge-sched")
def scheduler() -> None:
    """Group nodes by latency and place services near their users."""


def counts(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """Parse a list of numbers of replicas, such as 3,5,8."""
    del context, parameter
    try:
        result = [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected numbers such as 3,5,8") from None
    if min(result) < 1:
        raise click.BadParameter("a service has at least one replica")
    return list(dict.fromkeys(result))


def stem(path: Path) -> str:
    """Return a file's name without its endings."""
    name = path.name
    while name.endswith(SUFFIXES):
        name = name[: name.rindex(".")]
    return name


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned text, all columns to the right."""
    widths = [max(len(row[index]) for row in [head, *rows]) for index in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    ]
    return "\n".join(lines)


def report(title: str, replay: Replay) -> str:
    """Return what a person reads of one replay."""
    groups, completion = replay.groups, replay.completion
    error = completion.errors.get(completion.estimator)
    lines = [
        f"{title}: {replay.matrix.size} nodes",
        f"  completion: {completion.estimator}"
        + (f", median relative error {error:.3f} on hidden pairs" if error is not None else "")
        + (f"; {len(completion.lone)} nodes without enough measurements" if len(completion.lone) else ""),
        f"  groups: {groups.k} at scale {groups.scale_ms:.1f} ms, silhouette {groups.silhouette:.3f}, "
        f"median RTT within a group {groups.within_ms:.1f} ms",
    ]
    for group, node in enumerate(groups.medoids):
        size = int((groups.labels == group).sum())
        lines.append(f"    {size:5d} nodes around {replay.matrix.names[node]}")
    if not replay.placed:
        return "\n".join(lines)
    names = list(replay.placed[0].baselines)
    rows = []
    for item in replay.placed:
        ours = item.placement
        row = [
            str(item.replicas),
            f"{ours.mean_ms:.2f}/{ours.p95_ms:.1f}",
            f"{ours.bound_ms:.2f}",
            f"{ours.gap:.2%}",
        ]
        row += [f"{mean:.2f}/{tail:.1f}" for mean, tail in item.baselines.values()]
        rows.append(row)
    lines.append("  user RTT, mean/p95 in ms, every node one user:")
    table = text_table(["replicas", "ours", "bound", "gap", *names], rows)
    lines += ["  " + line for line in table.splitlines()]
    for item in replay.placed:
        lines.append(
            f"  {item.replicas}: " + ", ".join(replay.matrix.names[node] for node in item.placement.nodes)
        )
        if item.decision is not None:
            lines.append(f"     kept from the file before: {item.decision.reason}")
    lines.append("  seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in replay.seconds.items()))
    return "\n".join(lines)


@scheduler.command("replay")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--replicas", default="3,5,8,20", show_default=True, callback=counts, help="Numbers to place.")
@click.option("--capacities", is_flag=True, help="Let no node serve more than 1.2 times an even share.")
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON: an object, or for several files a list of them in the same order.",
)
@click.option(
    "--details",
    is_flag=True,
    help="With --json: completion, 95th percentiles of the baselines, and whether a service moves.",
)
@click.option(
    "--progress/--no-progress",
    default=None,
    help="Say on stderr what is being done; by default where that is a terminal.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("replay"),
    show_default=True,
    help="Directory of the plots.",
)
@click.option(
    "--plots/--no-plots", default=True, show_default=True, help="Draw groups and user latency as PNG."
)
def replay_command(
    files: Sequence[Path],
    replicas: Sequence[int],
    capacities: bool,
    seed: int,
    as_json: bool,
    details: bool,
    progress: bool | None,
    output: Path,
    plots: bool,
) -> None:
    """Replay latency matrices through the whole pipeline, one round after the other.

    FILES are CSV, TSV (gzipped or not) or npz: a square matrix of RTT in ms, with or without names, or lines
    of source, dest, ms. Missing entries may be empty, nan, or 0 off the diagonal. Every node counts as one
    user.
    """
    if details and not as_json:
        raise click.UsageError("--details goes with --json")
    loud = sys.stderr.isatty() if progress is None else progress
    replayer = Replayer(replicas, seed, capacities)
    results: list[dict[str, object]] = []
    for path in files:
        try:
            tell = partial(say, stem(path)) if loud else silent
            tell("reading")
            replay = replayer.replay(read_matrix(path), tell)
        except CrossedgeError as error:
            text = str(error)
            raise click.ClickException(text if text.startswith(str(path)) else f"{path}: {text}") from error
        if plots:
            draw(replay, path, output)
        if as_json:
            results.append(replay.as_json(details))
        else:
            click.echo(report(stem(path), replay))
    if as_json:
        click.echo(json.dumps(results if len(files) > 1 else results[0], indent=2))


def say(title: str, text: str) -> None:
    """Tell a person that waits what is being done."""
    click.echo(f"{title}: {text}", err=True)


def draw(replay: Replay, path: Path, output: Path) -> None:
    """Write both plots of one replay."""
    from crossedge.sched.plots import (
        plot_groups,
        plot_latency,
    )  # here, because matplotlib takes half a second

    try:
        output.mkdir(parents=True, exist_ok=True)
        plot_groups(replay, output / f"{stem(path)}-groups.png", stem(path))
        plot_latency(replay, output / f"{stem(path)}-latency.png", stem(path))
    except OSError as error:
        raise click.ClickException(f"{output}: cannot write the plots: {error.strerror}") from error


class Lazy(click.Command):
    """A subcommand of the service, whose libraries are loaded only when it is called."""

    def __init__(self, name: str, text: str) -> None:
        """Stand for the command `name` of `serve`."""
        super().__init__(name, short_help=text, add_help_option=False)

    def _real(self) -> click.Command:
        from crossedge.sched import serve  # here, because the web server takes half a second

        command: click.Command = getattr(serve, self.name or "")
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Let the real command parse its options."""
        return self._real().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the real command."""
        return ctx.command.invoke(ctx)


scheduler.add_command(Lazy("run", "Take reports, group nodes, place services, answer over HTTP."))
scheduler.add_command(Lazy("show", "Say how the running scheduler is."))


def main() -> None:
    """Run the command; a mistake of the caller's is one line on stderr and exit status 2."""
    try:
        scheduler(prog_name="crossedge-sched", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"crossedge-sched: {error.format_message()}", err=True)
        raise SystemExit(2) from error
    except CrossedgeError as error:
        click.echo(f"crossedge-sched: {error}", err=True)
        raise SystemExit(2) from error
    except click.Abort as error:
        raise SystemExit(130) from error
