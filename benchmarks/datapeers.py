"""What benchmarks/datapath.py compares crossedge with: wireguard-go, Nebula, a stock peer of its own."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from dataworld import Authority, Crossedge, System, World, run, wait

from crossedge.lab.sites import FORWARDING

WIREGUARD_PORT: Final = 51820
NEBULA_PORT: Final = 4242


@dataclass(slots=True)
class Key:
    """An X25519 key pair, raw."""

    private: bytes
    public: bytes

    @classmethod
    def make(cls) -> Key:
        """Return a new one."""
        key = X25519PrivateKey.generate()
        return cls(
            key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()),
            key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
        )


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer of a wireguard-go."""

    public: bytes
    endpoint: str
    allowed: tuple[str, ...]


def build_wireguard(directory: Path) -> tuple[str, str, bool]:
    """Return the path of wireguard-go, its version, and whether it is the pinned, newest one."""
    peers = Path(__file__).resolve().parent / "peers"
    built = directory / "wireguard-go"
    pinned = re.search(r"golang\.zx2c4\.com/wireguard (\S+)", (peers / "go.mod").read_text())
    if pinned and shutil.which("go"):
        directory.mkdir(parents=True, exist_ok=True)
        words = ["go", "build", "-o", str(built), "golang.zx2c4.com/wireguard"]
        done = subprocess.run(words, cwd=peers, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return str(built), pinned[1], True
        print(f"wireguard-go could not be built: {done.stderr.strip().splitlines()[-1]}")
    packaged = shutil.which("wireguard-go")
    if packaged is None:
        raise RuntimeError("no wireguard-go: neither a Go toolchain that builds it nor a packaged one")
    done = subprocess.run([packaged, "--version"], capture_output=True, text=True, check=False)
    return packaged, done.stdout.split("\n")[0].split()[-1], False


def start_wireguard(
    world: World, side: str, binary: str, key: Key, address: str, peers: Sequence[Peer]
) -> subprocess.Popen[bytes]:
    """Start a wireguard-go, configure it by its socket and bring its interface up."""
    site, device = world.site(side), f"wg{world.number}{side[0]}"
    environment = {**os.environ, "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1", "LOG_LEVEL": "error"}
    process = world.popen(site, [binary, "-f", device], f"wg-{side}", env=environment)
    path = Path(f"/var/run/wireguard/{device}.sock")
    wait(f"{device} answers", path.exists)
    lines = ["set=1", f"private_key={key.private.hex()}", f"listen_port={WIREGUARD_PORT}"]
    for peer in peers:
        lines += [f"public_key={peer.public.hex()}", f"endpoint={peer.endpoint}"]
        lines += [f"allowed_ip={prefix}" for prefix in peer.allowed]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        connection.sendall(("\n".join(lines) + "\n\n").encode())
        answer = connection.recv(4096).decode()
    if "errno=0" not in answer:
        raise RuntimeError(f"{device}: {answer}")
    run(site, "ip", "addr", "add", address, "dev", device)
    run(site, "ip", "link", "set", device, "up")
    for peer in peers:
        for prefix in peer.allowed:
            run(site, "ip", "route", "replace", prefix, "dev", device)
    return process


def wireguard(world: World, binary: str) -> System:
    """Return wireguard-go at both ends."""
    keys = {side: Key.make() for side in ("left", "right")}
    inner = {"left": f"10.8.{world.number}.1", "right": f"10.8.{world.number}.2"}
    daemons = []
    for side, other in (("left", "right"), ("right", "left")):
        peer = Peer(keys[other].public, f"{world.address(other)}:{WIREGUARD_PORT}", (f"{inner[other]}/32",))
        daemons.append(start_wireguard(world, side, binary, keys[side], f"{inner[side]}/32", [peer]))
    return System(world, world.left, world.right, inner["right"], daemons).serve()


def find_nebula() -> str:
    """Return the version of Nebula that is installed, or nothing."""
    nebula = shutil.which("nebula")
    if nebula is None or shutil.which("nebula-cert") is None:
        return ""
    done = subprocess.run([nebula, "-version"], capture_output=True, text=True, check=False)
    return done.stdout.strip().rpartition(" ")[2] or "unknown"


def nebula(world: World) -> System:
    """Return Nebula at both ends, with certificates of an authority of their own."""
    files = Path("/run/bench") / world.name
    files.mkdir()
    authority = ["-ca-crt", str(files / "ca.crt"), "-ca-key", str(files / "ca.key")]
    run(world.left, "nebula-cert", "ca", "-name", "bench", *(w.replace("-ca-", "-out-") for w in authority))
    inner = {"left": f"10.9.{world.number}.1", "right": f"10.9.{world.number}.2"}
    daemons = []
    for side, other in (("left", "right"), ("right", "left")):
        own = {"cert": str(files / f"{side}.crt"), "key": str(files / f"{side}.key")}
        words = [
            "-name",
            side,
            "-networks",
            f"{inner[side]}/24",
            "-out-crt",
            own["cert"],
            "-out-key",
            own["key"],
        ]
        run(world.left, "nebula-cert", "sign", *authority, *words)
        anything = [{"port": "any", "proto": "any", "host": "any"}]
        config = {
            "pki": {"ca": authority[1], **own},
            "static_host_map": {inner[other]: [f"{world.address(other)}:{NEBULA_PORT}"]},
            "lighthouse": {"am_lighthouse": False},
            "listen": {"host": "0.0.0.0", "port": NEBULA_PORT},
            "tun": {"dev": "nebula0"},
            "firewall": {"outbound": anything, "inbound": anything},
        }
        file = files / f"{side}.yml"
        file.write_text(json.dumps(config))  # JSON is YAML
        daemons.append(world.popen(world.site(side), ["nebula", "-config", str(file)], f"nebula-{side}"))
    return System(world, world.left, world.right, inner["right"], daemons).serve()


def wireguard_hub(world: World, binary: str) -> System:
    """Return wireguard-go at both ends and in the middle, through which everything goes."""
    keys = {side: Key.make() for side in ("left", "right", "middle")}
    inner = {"left": f"10.8.{world.number}.1", "right": f"10.8.{world.number}.2"}
    hub = [
        Peer(keys[side].public, f"{world.address(side)}:{WIREGUARD_PORT}", (f"{inner[side]}/32",))
        for side in inner
    ]
    world.site("middle").tune(FORWARDING)
    run(
        world.site("middle"),
        "nft",
        "add table inet apart; add chain inet apart f { type filter hook forward priority 0; }; "
        'add rule inet apart f iifname { "left", "right" } drop',
    )
    daemons = [start_wireguard(world, "middle", binary, keys["middle"], f"10.8.{world.number}.254/32", hub)]
    for side, other in (("left", "right"), ("right", "left")):
        gateway = f"{world.address(f'{side}-gateway')}:{WIREGUARD_PORT}"
        peer = Peer(keys["middle"].public, gateway, (f"{inner[other]}/32",))
        daemons.append(start_wireguard(world, side, binary, keys[side], f"{inner[side]}/32", [peer]))
    return System(world, world.left, world.right, inner["right"], daemons).serve()


def stock_peer(world: World, authority: Authority, binary: str) -> System:
    """Return a crossedge daemon on the left and a stock wireguard-go on the right."""
    key, inner = Key.make(), f"10.8.{world.number}.2"
    config = (
        f'[[static_peer]]\nname = "stock"\npublic_key = "{base64.b64encode(key.public).decode()}"\n'
        f'allowed_ips = ["{inner}/32"]\nendpoint = "{world.address("right")}:{WIREGUARD_PORT}"\n'
    )
    edge = Crossedge(world, authority, ["left"], config)
    certificate = edge.bundles["left"].certificate
    own = tuple(str(prefix) for prefix in certificate.allowed_ips if prefix.version == 4)
    peer = Peer(certificate.x25519, f"{world.address('left')}:41820", own)
    daemon = start_wireguard(world, "right", binary, key, f"{inner}/32", [peer])
    return System(world, world.left, world.right, inner, [edge.daemons["left"], daemon]).serve()
