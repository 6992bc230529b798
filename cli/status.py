"""`crossedge status|peers|ping|netcheck|routes`: what the daemon on this host says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from crossedge.cli.control import ask, ask_one
from crossedge.cli.tables import cell, echo_json, echo_rows, table

SOCKET: Final = Path("run/crossedge/meshd.sock")
KIB: Final = 1024
WORST: Final = 12  # counters shown; --json has them all

AnyCommand = TypeVar("AnyCommand", bound=Callable[..., Any])


def daemon_options(command: AnyCommand) -> AnyCommand:
    """Add `--json` and `--socket`."""
    as_json = click.option("--json", "as_json", is_flag=True, help="For programs.")
    path = click.option(
        "--socket",
        "path",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The daemon's control socket.  [default: /run/crossedge/meshd.sock]",
    )
    return as_json(path(command))


def _socket(path: Path | None) -> Path:
    root: Path = click.get_current_context().find_object(Path) or Path("/")
    return path or root / SOCKET


def _size(count: int) -> str:
    """Return bytes in the largest binary unit that leaves at least 1."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < KIB:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= KIB
    return f"{value:.1f} TiB"


def _span(seconds: float | None) -> str:
    """Return a length of time in its largest unit."""
    if seconds is None:
        return "-"
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


@click.command()
@daemon_options
def status(path: Path | None, as_json: bool) -> None:
    """Say whether this node is well, and what is wrong if it is not.

    The exit status is 0 if nothing is wrong, 3 if something is, 1 if the daemon does not answer.
    """
    answer = ask_one(_socket(path), "status")
    if as_json:
        echo_json(answer)
    else:
        _show_status(answer)
    if answer["problems"]:
        raise SystemExit(3)


def _show_status(answer: dict[str, Any]) -> None:
    peers, nat, blocklist = answer["peers"], answer["nat"], answer["blocklist"]
    certificate = answer["certificate"]
    udp = answer["offloads"]["udp"]
    offloads = "; ".join(
        f"{family} {' '.join(name for name, on in names.items() if on) or 'none'}"
        for family, names in udp.items()
    )
    facts = {
        "node": f"{answer['name']}, crossedge {answer['version']}, up {_span(answer['uptime_s'])}",
        "prefixes": ", ".join(answer["prefixes"]),
        "certificate": f"serial {certificate['serial']}, groups {cell(certificate['groups'])}, "
        f"ends in {_span(certificate['ends_in_s'])}",
        "blocklist": f"serial {blocklist['serial']}, {blocklist['revoked']} revoked, "
        f"{_span(blocklist['age_s'])} old",
        "clock": "synchronised" if answer["clock"]["synchronised"] else "not synchronised",
        "NAT": f"mapping {_words(nat['mapping'])}, filtering {_words(nat['filtering'])}, "
        f"ports {_words(nat['allocation'])}",
        "candidates": ", ".join(f"{each['endpoint']} ({each['kind']})" for each in answer["candidates"])
        or "-",
        "peers": f"{peers['known']} known, {peers['direct']} direct, {peers['relay']} relayed",
        "latency": f"{answer['latency']['measured']} pairs measured, "
        f"{answer['latency']['unreachable']} unreachable",
        "offloads": f"UDP: {offloads}; {_device(answer)}: {' '.join(answer['offloads']['tun']) or 'none'}",
    }
    width = max(map(len, facts))
    for name, text in facts.items():
        click.echo(f"{name.ljust(width)}  {text}")
    click.echo()
    columns = {
        "endpoint": "RENDEZVOUS",
        "state": "STATE",
        "observed": "SEEN AS",
        "rtt_ms": "RTT MS",
        "heard_s_ago": "HEARD S AGO",
    }
    echo_rows(answer["rendezvous"], columns, as_json=False, none="no rendezvous")
    worst = sorted(answer["dropped"].items(), key=lambda item: -item[1])[:WORST]
    if worst:
        click.echo()
        click.echo("dropped  " + ", ".join(f"{name} {count}" for name, count in worst))
    click.echo()
    for problem in answer["problems"]:
        click.echo(f"wrong: {problem['what']}\n       {problem['fix']}")
    if not answer["problems"]:
        click.echo("nothing is wrong")


def _device(answer: dict[str, Any]) -> str:
    """Return what hands the host's packets to the daemon; one of an earlier release does not say."""
    return "veth" if answer["host"]["tun"].get("kind") == "veth" else "TUN"


def _words(name: str) -> str:
    return name.replace("_", "-")


@click.command()
@daemon_options
def peers(path: Path | None, as_json: bool) -> None:
    """List the peers: path, round-trip time, loss, traffic."""
    rows = ask_one(_socket(path), "peers")["peers"]
    if as_json:
        echo_json(rows)
        return
    shown = [
        row
        | {
            "traffic": f"{_size(row['sent_bytes'])} / {_size(row['received_bytes'])}",
            "heard": _span(row["heard_s_ago"]),
            "age": _span(row["measured_s_ago"]),
        }
        for row in rows
    ]
    columns = {
        "name": "PEER",
        "state": "STATE",
        "path": "PATH",
        "endpoint": "ENDPOINT",
        "rtt_ms": "RTT MS",
        "jitter_ms": "JITTER MS",
        "loss_percent": "LOSS %",
        "age": "AGE",
        "datagram_bytes": "DATAGRAM",
        "traffic": "SENT / RECEIVED",
        "heard": "HEARD AGO",
    }
    echo_rows(shown, columns, as_json=False, none="no peers are known")


@click.command()
@daemon_options
def latency(path: Path | None, as_json: bool) -> None:
    """Show what this node measured of each pair: directly or through a relay, how far, how sure, how old.

    The least RTT is that of the last quarter of an hour: the distance. An unreachable peer has no number.
    """
    answer = ask_one(_socket(path), "latency")
    if as_json:
        echo_json(answer)
        return
    columns = {
        "name": "PEER",
        "state": "STATE",
        "rtt_min_ms": "LEAST RTT MS",
        "rtt_ms": "RTT MS",
        "jitter_ms": "JITTER MS",
        "loss_percent": "LOSS %",
        "age": "AGE",
    }
    rows = [row | {"age": _span(row["age_s"])} for row in answer["pairs"]]
    echo_rows(rows, columns, as_json=False, none="no peers are known")
    for report in answer["reports"]:
        accepted = report["accepted_s_ago"]
        told = "never" if accepted is None else f"{_span(accepted)} ago"
        click.echo(
            f"\n{report['url']}: took a report {told}"
            + (f"; {report['problem']}" if report["problem"] else "")
        )


@click.command()
@click.argument("peer")
@click.option(
    "-c", "--count", type=click.IntRange(1, 1000), default=5, show_default=True, help="Probes to send."
)
@click.option(
    "-i",
    "--interval",
    type=click.FloatRange(0.01, 60),
    default=1.0,
    show_default=True,
    help="Seconds between probes.",
)
@daemon_options
def ping(peer: str, count: int, interval: float, path: Path | None, as_json: bool) -> None:
    """Probe PEER through its encrypted path, opening one where there is none.

    The exit status is 0 if at least one probe was answered, else 1.
    """
    answers = []
    for answer in ask(_socket(path), "ping", wait=interval, peer=peer, count=count, interval_s=interval):
        answers.append(answer)
        if as_json:
            continue
        if answer["rtt_ms"] is None:
            click.echo(f"{answer['number']:4}  no answer{': ' if answer['note'] else ''}{answer['note']}")
        else:
            click.echo(f"{answer['number']:4}  {answer['rtt_ms']:8.2f} ms  {answer['path']}")
    times = sorted(answer["rtt_ms"] for answer in answers if answer["rtt_ms"] is not None)
    summary = {
        "peer": peer,
        "sent": len(answers),
        "answered": len(times),
        "rtt_ms": {"min": times[0], "median": times[len(times) // 2], "max": times[-1]} if times else None,
    }
    if as_json:
        echo_json({**summary, "probes": answers})
    elif times:
        click.echo(
            f"{peer}: {len(times)} of {len(answers)} answered, "
            f"{times[0]:.2f} / {times[len(times) // 2]:.2f} / {times[-1]:.2f} ms (least, median, most)"
        )
    else:
        click.echo(f"{peer}: none of {len(answers)} answered")
    if not times:
        raise SystemExit(1)


@click.command()
@daemon_options
def netcheck(path: Path | None, as_json: bool) -> None:
    """Say what kind of NAT this node is behind (RFC 4787, by the tests of RFC 5780); takes up to 5 s."""
    report = ask_one(_socket(path), "netcheck")
    if as_json:
        echo_json(report)
        return
    rows = [
        {"topic": topic, "value": found["value"], "why": found["why"]}
        for topic, found in report["findings"].items()
    ]
    click.echo(table(rows, {"topic": "WHAT", "value": "FOUND", "why": "WHY"}))
    click.echo()
    seen = [{**each, "rtt_ms": report["rtt_ms"].get(each["server"])} for each in report["observations"]]
    echo_rows(
        seen,
        {"server": "SERVER", "endpoint": "SAW US AT", "rtt_ms": "RTT MS"},
        as_json=False,
        none="no server answered",
    )


@click.command()
@daemon_options
def routes(path: Path | None, as_json: bool) -> None:
    """List the prefixes that go through the mesh, and those that are ours."""
    answer = ask_one(_socket(path), "routes")
    if as_json:
        echo_json(answer)
        return
    columns = {"prefix": "PREFIX", "peer": "PEER", "kind": "KIND", "mtu_bytes": "MTU"}
    echo_rows(answer["routes"], columns, as_json=False)
