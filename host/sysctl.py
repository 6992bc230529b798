"""Sysctls that we need, with what they were before.

Names are paths below /proc/sys ("net/ipv4/conf/eth0.5/rp_filter"), because the name of a link may hold dots.
Those below net/ are of the calling thread's network namespace.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/proc/sys")
VALUE_LIMIT = 4096
FORWARDING = {"net/ipv4/ip_forward": "ipv4", "net/ipv6/conf/all/forwarding": "ipv6"}
"""Sysctls that the kernel carries on to others, and their family."""


def read(name: str) -> str | None:
    """Return the value of a sysctl; None where the kernel has none of that name."""
    try:
        descriptor = os.open(f"{ROOT}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return os.read(descriptor, VALUE_LIMIT).decode().strip()
    finally:
        os.close(descriptor)


def write(name: str, value: str) -> None:
    """Set a sysctl; raises `OSError`."""
    descriptor = os.open(f"{ROOT}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


class Change(NamedTuple):
    """A sysctl that we changed."""

    before: str
    ours: str


def followers(name: str, change: Change) -> Iterator[tuple[str, Change]]:
    """Yield what the kernel sets along with a sysctl, where setting that one back would not set it back.

    Forwarding for all is written to each interface, and IPv4 redirects are accepted where nothing is
    forwarded (inet_forward_change and addrconf_forward_change in the kernel).
    """
    if name not in FORWARDING:
        return
    family = FORWARDING[name]
    for each in (ROOT / f"net/{family}/conf").iterdir():
        follower = f"net/{family}/conf/{each.name}/forwarding"
        before = read(follower) if each.name != "all" else None
        if before not in (None, change.before):
            yield follower, Change(str(before), change.ours)
    if family == "ipv4":
        follower = "net/ipv4/conf/all/accept_redirects"
        gets = {value: str(int(value == "0")) for value in change}
        before = read(follower)
        if before not in (None, gets[change.before]):
            yield follower, Change(str(before), gets[change.ours])


@dataclass(frozen=True, slots=True)
class Needed:
    """A sysctl that was asked for."""

    name: str
    wanted: str
    before: str | None
    """What it was when we first changed it; None where it was right already, or cannot be known."""
    now: str | None
    """What it is; None where the kernel does not have it."""
    error: str = ""
    """Why it could not be set."""

    @property
    def met(self) -> bool:
        """Whether it is as we need it, or does not exist here (no IPv6, say)."""
        return self.now is None or self.now == self.wanted


class Sysctls:
    """The sysctls that one program needs."""

    def __init__(
        self,
        changes: Mapping[str, Change] | None = None,
        save: Callable[[Mapping[str, Change]], None] | None = None,
    ) -> None:
        """Start from the changes that an earlier life recorded; `save` is called before a new one is made."""
        self.changes: dict[str, Change] = dict(changes or {})
        """What we changed, by name; to be kept across restarts, so that it can be undone."""
        self._save = save
        self._wanted: dict[str, str] = {}
        self._errors: dict[str, str] = {}

    def require(self, name: str, value: str) -> bool:
        """Set a sysctl unless it is right; return whether it was changed. A failure is told by `report`."""
        self._wanted[name] = value
        self._errors.pop(name, None)
        now = read(name)
        if now is None or now == value:
            return False
        known = self.changes.get(name)
        change = Change(known.before if known else now, value)
        along = {} if known else {k: v for k, v in followers(name, change) if k not in self.changes}
        if known != change:
            self.changes |= along  # before the one that they follow, and so restored after it
            self.changes[name] = change
            if self._save is not None:
                self._save(self.changes)  # first, so that a crash between the two loses nothing
        try:
            write(name, value)
        except OSError as error:
            self._errors[name] = error.strerror or str(error)
            if known is None:
                for each in (name, *along):
                    self.changes.pop(each, None)
            return False
        return True

    def enforce(self) -> list[str]:
        """Set again what somebody changed; return the names of what was."""
        return [name for name, value in list(self._wanted.items()) if self.require(name, value)]

    def report(self) -> list[Needed]:
        """Return all that were asked for, as they are now."""
        return [
            Needed(
                name,
                value,
                self.changes[name].before if name in self.changes else None,
                read(name),
                self._errors.get(name, ""),
            )
            for name, value in self._wanted.items()
        ]

    def restore(self) -> list[str]:
        """Undo our changes, last first, where the value still is ours; return the names."""
        restored = []
        ours = {name: change for name, change in self.changes.items() if read(name) == change.ours}
        for name, change in reversed(ours.items()):
            if read(name) == change.before:
                continue
            try:
                write(name, change.before)
            except OSError:
                continue
            restored.append(name)
        self.changes.clear()
        self._wanted.clear()
        return restored
