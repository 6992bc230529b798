"""`crossedge-sched run` and `show`: sockets, the web server, and what a running scheduler says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any, Final

import click
import uvicorn
import uvloop

from crossedge.sched.api import create_app
from crossedge.sched.config import CONFIG_FILE, DEFAULT_PORT, SchedConfig, load_config, rooted
from crossedge.sched.service import SchedulerService
from crossedge.sched.trust import Trust, addresses, load_token, load_trust
from crossedge.wire.errors import ConfigError

BACKLOG: Final = 2048
IP_FREEBIND: Final = 15  # ip(7); the overlay address comes up when the mesh daemon does
IPV6_FREEBIND: Final = 78
KEEP_ALIVE: Final = 75
"""Seconds that a connection without a request stays open."""

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    default=None,
    help=f"Configuration file; every key has a default, so there need not be one.  [default: {CONFIG_FILE}]",
)
root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    show_default=True,
    help="Directory that stands before every path, the configuration's too.",
)


def configuration(config_file: Path | None, root: Path) -> tuple[SchedConfig, Path]:
    """Return the configuration and the file it is of; `ConfigError` where it cannot be used."""
    file = rooted(root, (config_file or CONFIG_FILE).absolute())
    return load_config(file, config_file is not None), file


def opened(where: list[tuple[str, int]], file: Path) -> list[socket.socket]:
    """Return listening sockets; `ConfigError` where an address cannot be had."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for host, port in where:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            try:
                sock.bind((host, port))
                sock.listen(BACKLOG)
            except OSError as error:
                wanted = f"addresses that are free; {host} port {port}: {error.strerror}"
                raise ConfigError(file, "listen", wanted) from error
            sock.setblocking(False)
            sockets.append(sock)
        stack.pop_all()
        return sockets


def notify_ready() -> None:
    """Tell the service manager that we listen, where one started us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)


def described(host: str, port: int) -> str:
    """Return an address as a URL."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(config: SchedConfig, trust: Trust, root: Path, file: Path) -> None:
    """Serve until a signal."""
    sockets = opened(addresses(config, trust), file)
    log = logging.getLogger("crossedge-sched")
    try:
        service = SchedulerService(config, trust, root)
    except ConfigError:
        for sock in sockets:
            sock.close()
        raise
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=config.limits.connections,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=3,
            ws="none",
            http="h11",
        )
    )
    where = ", ".join(described(*sock.getsockname()[:2]) for sock in sockets)
    log.info(
        "listening on %s; writes %s", where, "want the token" if service.token else "are off: no token_file"
    )
    notify_ready()
    await server.serve(sockets)


@click.command()
@config_option
@root_option
@click.option("--check-config", is_flag=True, help="Say whether the configuration can be used, and end.")
def run(config_file: Path | None, root: Path, check_config: bool) -> None:
    r"""Take the nodes' reports, group the nodes, place services, and answer over HTTP.

    The page is at http://127.0.0.1:8478/, the description of the API at /openapi.json. Without a
    configuration the network is that of this host's node bundle; `network` in sched.toml names it where there
    is none. Nodes send their reports to /v1/reports: name this server in their configuration. Reading is free
    at the addresses that are listened at (loopback and overlay); writing wants a token:

    \b
        head -c 24 /dev/urandom | base64 > /etc/crossedge/sched.token; chmod 600 /etc/crossedge/sched.token
        echo 'token_file = "/etc/crossedge/sched.token"' >> /etc/crossedge/sched.toml
    """
    config, file = configuration(config_file, root)
    trust = load_trust(config, root, file)
    if config.token_file is not None:
        load_token(rooted(root, config.token_file))
    if check_config:
        where = ", ".join(described(*address) for address in addresses(config, trust))
        click.echo(f"{file} is fine: {where}")
        return
    logging.basicConfig(
        stream=sys.stderr, level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s"
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, trust, root, file))


def fetched(server: str, path: str, token: bytes | None) -> dict[str, Any]:
    """Return what a running scheduler answers; `click.ClickException` where it does not."""
    host, _, port = server.rpartition(":")
    connection = http.client.HTTPConnection(
        host.strip("[]"), int(port) if port.isdigit() else DEFAULT_PORT, 10
    )
    headers = {} if token is None else {"Authorization": f"Bearer {token.decode()}"}
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        content = json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise click.ClickException(f"no scheduler answers at {server} ({error})") from error
    finally:
        connection.close()
    if answer.status != 200 or not isinstance(content, dict):
        raise click.ClickException(f"{server} answers {answer.status}: {content}")
    return content


@click.command()
@config_option
@root_option
@click.option("--server", default="", metavar="HOST:PORT", help="Where it listens.  [default: as configured]")
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def show(config_file: Path | None, root: Path, server: str, as_json: bool) -> None:
    """Say how the running scheduler is: nodes, groups, services, and what is wrong."""
    config, file = configuration(config_file, root)
    token = None
    if config.token_file is not None and config.reads == "token":
        token = load_token(rooted(root, config.token_file))
    if not server:
        first = addresses(config, load_trust(config, root, file))
        server = f"{first[0][0]}:{first[0][1]}" if first else f"127.0.0.1:{DEFAULT_PORT}"
    found = {
        name: fetched(server, f"/v1/{name}", token) for name in ("status", "nodes", "groups", "services")
    }
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for line in lines(found):
        click.echo(line)


def lines(found: dict[str, Any]) -> list[str]:
    """Return what a person reads."""
    status, groups = found["status"], found["groups"]
    counts, pairs = status["nodes"], status["pairs"]
    result = [
        f"up {status['uptime_s']:.0f} s, round {status['round']}; {counts['all']} nodes: "
        f"{counts['fresh']} fresh, {counts['stale']} stale, {counts['silent']} silent",
        "pairs: " + ", ".join(f"{value} {name}" for name, value in pairs.items()),
    ]
    if groups["silhouette"] is not None:
        result.append(
            f"groups: {groups['k']}, silhouette {groups['silhouette']:.3f}, "
            f"median RTT within a group {groups['within_ms'] or 0:.1f} ms"
        )
    for group in groups["groups"]:
        some = ", ".join(group["members"][:6]) + (", ..." if group["size"] > 6 else "")
        result.append(f"  group {group['id']}: {group['size']} nodes around {group['medoid']}: {some}")
    ages = [node for node in found["nodes"]["nodes"] if node["state"] != "fresh"]
    result += [
        f"  {node['name']}: {node['state']}, last report {node['report_age_s']:.0f} s ago"
        for node in ages[:20]
    ]
    for service in found["services"]["services"]:
        decision = service["decision"]
        told = "not decided yet" if decision is None else decision["error"] or decision["reason"]
        result.append(f"service {service['name']}: {', '.join(service['current']) or 'nowhere'}; {told}")
    return result + [f"problem: {problem}" for problem in status["problems"]]
