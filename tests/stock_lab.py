"""A real daemon in namespaces, joined by stock WireGuard peers: the Debian package's wireguard-go and wg.

    with stock_lab(tmp_path, EDGE_AND_PEERS) as lab:
        lab.ping(lab.pod, lab.peers["lodge"].inner4)

           town ---- cloud        the rendezvous
             |------ edge         meshd, TUN crossedge0, a pod
             |------ lodge        wireguard-go, public address
             |------ vault        wireguard-go, public address, pre-shared key
             '------ cabin-router (kernel masquerade) ---- cabin   wireguard-go

A peer's inner addresses are 10.8.N.1 and fd88:N::1, with N its place in `PEERS`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossedge.lab.demo import bundle_of
from crossedge.lab.demo_mesh import Member, Mesh
from crossedge.lab.network import Network
from crossedge.lab.pings import PingResult, PingRun, Running
from crossedge.lab.topology import parse_topology
from tests.underlays import behind, inside, node, region, serving, underlay
from tests.waiting import until

TOWN = "town"
TOPOLOGY = underlay(
    "stock",
    region(TOWN),
    serving("cloud", TOWN),
    node("edge", TOWN),
    serving("lodge", TOWN),
    serving("vault", TOWN),
    behind("cabin-router", place=TOWN),
    inside("cabin-router", "cabin", role="server"),
)
PORT = 51820
EDGE_PORT = 41820
START = 15.0  # seconds that a program may take until it answers, on a busy machine


@dataclass(slots=True)
class StockPeer:
    """One wireguard-go."""

    name: str
    number: int
    host: str
    """The node that it runs on."""
    preshared: str = ""
    """Base64, or empty; `at_edge` is what the daemon is told, where that is another one."""
    at_edge: str | None = None
    known: bool = True
    """Whether the daemon is told its endpoint."""
    keepalive: int = 0
    private: str = ""
    public: str = ""
    directory: Path = field(default_factory=Path)

    @property
    def device(self) -> str:
        return f"wg-{self.name}"

    @property
    def port(self) -> int:
        return PORT + self.number

    @property
    def inner4(self) -> str:
        return f"10.8.{self.number}.1"

    @property
    def inner6(self) -> str:
        return f"fd88:{self.number}::1"

    @property
    def allowed(self) -> list[str]:
        return [f"10.8.{self.number}.0/24", f"fd88:{self.number}::/64"]

    @property
    def log(self) -> str:
        return (self.directory / f"{self.name}.log").read_text()


class StockLab:
    """What a test asks of it."""

    def __init__(self, network: Network, mesh: Mesh, peers: dict[str, StockPeer], directory: Path) -> None:
        self.network = network
        self.mesh = mesh
        self.peers = peers
        self.directory = directory
        self.edge: Member = mesh.members["edge"]
        certificate = bundle_of(self.edge).certificate
        self.public = base64.b64encode(certificate.x25519).decode()
        self.prefixes = [str(prefix) for prefix in certificate.allowed_ips]
        self.overlay4, self.overlay6 = str(certificate.overlay4), str(certificate.overlay6)
        pod = network.attach_pod("edge", "edge")
        self.pod, self.pod4, self.pod6 = pod.name, pod.address(4), pod.address(6)
        self._pings = 0

    def run(self, where: str, *command: str, timeout: float = 30.0) -> str:
        """Run a program in a namespace; it must succeed."""
        done = self.network.run(where, command, timeout)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def ping(self, where: str, target: str, *options: str, count: int = 5) -> PingResult:
        """Ping; the result says what became of it."""
        return self.start_ping(where, target, count, 0.05, *options).wait(20.0 + count)

    def start_ping(self, where: str, target: str, count: int, interval: float, *options: str) -> Running:
        """Begin to ping."""
        self._pings += 1
        file = self.directory / f"ping-{self._pings}.txt"
        return PingRun(where, target, file, count, interval, options).start(self.network)

    def iperf(self, client: str, server: str, target: str, *options: str) -> dict[str, Any]:
        """Run iperf3 for a second and return what it says at the end."""
        listening = self.network.popen(
            server, ["iperf3", "-s", "-1", "-J"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            until("iperf3 listens", lambda: ":5201" in self.run(server, "ss", "-ltn"), START)
            said = self.run(client, "iperf3", "-c", target, "-t", "1", "-J", *options)
        finally:
            listening.terminate()
            listening.communicate()
        end: dict[str, Any] = json.loads(said)["end"]
        return end

    def peer(self, name: str) -> dict[str, Any]:
        """Return what `crossedge peers --json` says of a peer."""
        return self.mesh.peers(self.edge)[name]

    def status(self) -> dict[str, Any]:
        """Return the daemon's status."""
        return self.edge.ask("status")

    def dropped(self) -> dict[str, int]:
        """Return the daemon's counters of what was dropped."""
        found: dict[str, int] = self.status()["dropped"]
        return found

    def wg(self, peer: StockPeer, *words: str) -> str:
        """Run `wg` beside a peer."""
        return self.run(peer.host, "wg", *words)

    def handshake(self, peer: StockPeer) -> int:
        """Return when the stock side completed its last handshake, in Unix seconds; 0 if it never did."""
        return int(self.wg(peer, "show", peer.device, "latest-handshakes").split()[-1])


def _keys(peer: StockPeer) -> None:
    def wg(*words: str, given: str = "") -> str:
        return subprocess.run(["wg", *words], input=given, capture_output=True, text=True, check=True).stdout

    peer.private = wg("genkey")
    peer.public = wg("pubkey", given=peer.private).strip()


def _config(network: Network, peers: Sequence[StockPeer], root: Path) -> str:
    text = 'log_level = "debug"\n'
    for peer in peers:
        text += f'[[static_peer]]\nname = "{peer.name}"\npublic_key = "{peer.public}"\n'
        text += f"allowed_ips = {json.dumps(peer.allowed)}\n"
        secret = peer.preshared if peer.at_edge is None else peer.at_edge
        if secret:
            file = f"/etc/crossedge/{peer.name}.psk"
            beneath = root / file[1:]
            beneath.parent.mkdir(parents=True, exist_ok=True)
            beneath.write_text(secret + "\n")
            beneath.chmod(0o600)
            text += f'preshared_key_file = "{file}"\n'
        if peer.known:
            text += f'endpoint = "{network.nodes[peer.host].address4}:{peer.port}"\n'
    return text


def _start_stock(lab: StockLab, peer: StockPeer, stack: ExitStack) -> None:
    log = stack.enter_context((lab.directory / f"{peer.name}.log").open("w"))
    daemon = lab.network.popen(
        peer.host,
        ["wireguard-go", "-f", peer.device],
        stdout=log,
        stderr=log,
        env={**os.environ, "LOG_LEVEL": "verbose", "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1"},
    )

    def stop() -> None:
        daemon.terminate()
        daemon.wait(10)

    stack.callback(stop)
    until(f"{peer.device} answers", Path(f"/var/run/wireguard/{peer.device}.sock").exists, START)
    key = lab.directory / f"{peer.name}.key"
    key.write_text(peer.private)
    key.chmod(0o600)
    words = ["allowed-ips", ",".join(lab.prefixes)]
    words += ["endpoint", f"{lab.network.nodes['edge'].address4}:{EDGE_PORT}"]
    if peer.preshared:
        secret = lab.directory / f"{peer.name}.psk"
        secret.write_text(peer.preshared + "\n")
        words += ["preshared-key", str(secret)]
    if peer.keepalive:
        words += ["persistent-keepalive", str(peer.keepalive)]
    lab.wg(peer, "set", peer.device, "private-key", str(key), "listen-port", str(peer.port))
    for address in (f"{peer.inner4}/24", f"{peer.inner6}/64"):
        lab.run(peer.host, "ip", "addr", "add", address, "dev", peer.device)
    lab.run(peer.host, "ip", "link", "set", peer.device, "up")
    lab.wg(peer, "set", peer.device, "peer", lab.public, *words)
    if lab.run(peer.host, "ip", "route", "show", lab.prefixes[0]) == "":
        for prefix in lab.prefixes:
            lab.run(peer.host, "ip", "route", "add", prefix, "dev", peer.device)


@contextmanager
def stock_lab(directory: Path, peers: Sequence[StockPeer]) -> Iterator[StockLab]:
    """Build the network, start the daemon and the stock peers; everything ends with the context."""
    with ExitStack() as stack:
        network = stack.enter_context(Network(parse_topology(TOPOLOGY, "stock.toml")))
        mesh = Mesh(network, stack, directory)
        mesh.servers[:] = ["cloud"]
        for peer in peers:
            peer.directory = directory
            _keys(peer)
        mesh.make_identities(install=["--now"])
        mesh.start({"edge": _config(network, peers, mesh.members["edge"].root)})
        lab = StockLab(network, mesh, {peer.name: peer for peer in peers}, directory)
        mesh.wait("answering", lambda member: bool(member.ask("status")), START)
        for peer in peers:
            _start_stock(lab, peer, stack)
        yield lab
        mesh.check_alive()


def counted(text: str, pattern: str) -> int:
    """Return how often a pattern stands in a text."""
    return len(re.findall(pattern, text))
