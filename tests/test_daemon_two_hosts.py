"""The README's commands, as they stand there, join two hosts behind NATs. Nothing of the lab is used here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.waiting import until

pytestmark = pytest.mark.namespaces

HEADING = "## Two real hosts"
RENDEZVOUS = "203.0.113.1"
"""The address that the README takes for the rendezvous."""
MASQUERADE = """
table ip nat {
  chain postrouting { type nat hook postrouting priority srcnat; oifname "wan" masquerade; }
}
table inet filter {
  chain input {
    type filter hook input priority filter;
    ct state established,related accept
    iifname "wan" drop
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname "lan" accept
  }
}
"""
PRIVATE = """
mkdir -p {place}/etc
mount --bind /etc {place}/etc
mount -t tmpfs tmpfs /etc
ln -s {place}/etc/* /etc/
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /run
echo ready
exec sleep 600
"""
"""A machine of its own: /etc can be written and shows what it had, /var/lib and /run are empty."""


def sh(script: str) -> None:
    """Run lines of shell; a failure fails the test with what was said."""
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{script}\n{done.stderr}"


class Machine:
    """A network namespace with files of its own, and a directory that whoever works there is in."""

    def __init__(self, stack: ExitStack, name: str, place: Path) -> None:
        self.name = name
        self.home = place / name
        self.home.mkdir()
        self._stack = stack
        script = PRIVATE.format(place=self.home)
        self._holder = subprocess.Popen(
            ["ip", "netns", "exec", name, "sh", "-euc", script], stdout=subprocess.PIPE, text=True
        )
        stack.callback(end, self._holder)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"

    def _enter(self, script: str) -> list[str]:
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        inside = f"export PATH={path}; cd {self.home}; {script}"
        return ["nsenter", f"--target={self._holder.pid}", "--mount", "--net", "--", "sh", "-euc", inside]

    def run(self, script: str) -> str:
        """Run commands to their end; return what they printed."""
        done = subprocess.run(self._enter(script), capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"on {self.name}: {script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def works(self, script: str) -> bool:
        """Tell whether a command succeeds."""
        return (
            subprocess.run(self._enter(script), capture_output=True, timeout=30, check=False).returncode == 0
        )

    def start(self, script: str) -> Path:
        """Run commands of which the last does not end; return the file that gets what they print."""
        log = self.home / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(self._enter(f"exec 2>&1; {script}"), stdout=output)
        self._stack.callback(end, process)
        return log


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a process."""
    process.terminate()
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def commands(repository: Path) -> list[str]:
    """Return the shell blocks of the README's section, in order."""
    section = (repository / "README.md").read_text().split(f"\n{HEADING}\n")[1].split("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def of(block: str, host: str) -> str:
    """Return a block that speaks of host `a` for another one."""
    return re.sub(r"(?<![\w-])a(?=[.\s])", host, block)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[ExitStack, Path]]:
    with ExitStack() as stack:
        names = ("internet", "rendezvous", "router-a", "router-b", "a", "b")
        for name in names:
            sh(f"ip netns add {name}; ip -n {name} link set lo up")
            stack.callback(sh, f"ip netns delete {name}")
        sh("ip -n internet link add wan type bridge; ip -n internet link set wan up")
        for number, name in enumerate(("rendezvous", "router-a", "router-b"), 1):
            sh(
                f"""
                ip link add wan netns {name} type veth peer name w{number} netns internet
                ip -n internet link set w{number} master wan up
                ip -n {name} address add 203.0.113.{number}/24 dev wan
                ip -n {name} link set wan up
                """
            )
        for host in ("a", "b"):
            router = f"router-{host}"
            sh(
                f"""
                ip link add lan netns {router} type veth peer name eth0 netns {host}
                ip -n {router} address add 192.168.1.1/24 dev lan
                ip -n {router} link set lan up
                ip -n {host} address add 192.168.1.2/24 dev eth0
                ip -n {host} link set eth0 up
                ip -n {host} route add default via 192.168.1.1
                ip netns exec {router} sysctl -qw net.ipv4.ip_forward=1
                ip netns exec {router} nft '{MASQUERADE}'
                """
            )
        yield stack, tmp_path


def test_the_commands_of_the_readme_join_two_hosts_behind_nats(
    repository: Path, place: tuple[ExitStack, Path]
) -> None:
    stack, folder = place
    make_network, serve, make_keys, sign, join = commands(repository)
    own, server, a, b = (Machine(stack, name, folder) for name in ("internet", "rendezvous", "a", "b"))

    made = own.run(make_network)
    key = re.search(r"^ca key\s+(\S+)$", made, re.MULTILINE)
    assert key is not None, made
    log = server.start(serve.replace("CA-KEY", key[1]))
    until("the rendezvous has printed what nodes need", lambda: b"#" in log.read_bytes(), 10.0)
    named = re.search(rf"^{re.escape(RENDEZVOUS)}:3478#\S+$", log.read_text(), re.MULTILINE)
    assert named is not None, log.read_text()
    for host in (a, b):
        host.run(of(make_keys, host.name))
        shutil.copy(host.home / f"{host.name}.request", own.home)
        own.run(of(sign, host.name).replace("RENDEZVOUS", named[0]))
        shutil.copy(own.home / f"{host.name}.bundle", host.home)
        host.start(of(join, host.name))

    def prefixes(host: Machine) -> list[str]:
        answer = host.run("crossedge status --json || [ $? = 3 ]")
        return [str(prefix) for prefix in json.loads(answer)["prefixes"]]

    def row(host: Machine) -> list[str]:
        _, *rows = host.run("crossedge peers").splitlines()
        return rows[0].split()[:3] if rows else []

    def direct(host: Machine, other: Machine) -> bool:
        return row(host) == [other.name, "up", "direct"]

    reachable = {}
    for host in (a, b):
        until(f"meshd on {host.name} is up", partial(host.works, "crossedge routes"), 10.0)
        overlay4, overlay6, pods4, pods6 = prefixes(host)
        pods = [pods4.replace(".0/24", ".1"), pods6.replace("::/64", "::1")]
        host.run("; ".join(f"ip address add {address} dev lo" for address in pods))
        reachable[host.name] = [overlay4.split("/")[0], overlay6.split("/")[0], *pods]
    for host, other in ((a, b), (b, a)):
        until(f"{host.name} knows {other.name}", partial(row, host), 10.0)
        for address in reachable[other.name]:
            until(f"{host.name} reaches {address}", partial(host.works, f"ping -c 1 -W 1 {address}"), 5.0)
    for host, other in ((a, b), (b, a)):
        until(f"{host.name} is direct", partial(direct, host, other), 10.0)
        assert "5 of 5 answered" in host.run(f"crossedge ping {other.name} -i 0.1")
