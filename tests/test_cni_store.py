"""The store keeps what it acknowledged: over a power failure at any moment, damage, and other writers."""

from __future__ import annotations

import ipaddress
import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from crossedge.cni import store as module
from crossedge.cni.ipam import ADDED, COOL_DOWN, GONE, Entry, Ledger
from crossedge.cni.spec import CniError
from crossedge.cni.store import LOG, Store

PREFIXES = (ipaddress.ip_network("10.160.1.0/24"), ipaddress.ip_network("fd00::/64"))


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def draft(container: str, now: float = 100.0) -> Entry:
    return Entry(0, "net", container, "eth0", (), host=f"ce{container}", boot="boot", changed=now)


def reserve(store: Store, container: str) -> Entry:
    with store.transaction() as change:
        change.ledger.expire(change.now)
        return change.put(change.ledger.reserve(draft(container, change.now), PREFIXES, ()))


def finish(store: Store, entry: Entry, state: str) -> Entry:
    with store.transaction() as change:
        return change.put(replace(entry, state=state, changed=change.now))


# Power failure

File = int
"""A file is known by the order of its making."""


@dataclass
class Disk:
    """What a disk holds, and what only the page cache does, by the calls that were made.

    The order of what was not flushed is not known: a name that was made or moved since the last flush of the
    directory may be there or not, and of bytes written since the last flush of the file all, some, or zeroes.
    """

    directory: Path
    data: dict[File, bytes] = field(default_factory=dict)
    flushed: dict[File, int] = field(default_factory=dict)
    names: dict[str, File] = field(default_factory=dict)
    durable: dict[str, File] = field(default_factory=dict)
    pending: list[dict[str, File]] = field(default_factory=list)
    """The names as they were after each change since the last flush of the directory."""
    opened: dict[int, File | None] = field(default_factory=dict)
    """By descriptor; None is the directory."""

    def states(self) -> Iterator[dict[str, bytes]]:
        """Yield what may be found after the power has failed now."""
        for names in [self.durable, *self.pending]:
            choices = []
            for name, number in names.items():
                data, safe = self.data[number], self.flushed.get(number, 0)
                tail = data[safe:]
                variants = {data, data[:safe], data[:safe] + tail[: len(tail) // 2]}
                variants.add(data[:safe] + bytes(len(tail)))
                choices.append([(name, variant) for variant in variants])
            for chosen in itertools.product(*choices):
                yield dict(chosen)

    def renamed(self) -> None:
        self.pending.append(dict(self.names))

    def watch(self, monkeypatch: pytest.MonkeyPatch, after: Any) -> None:
        real = {name: getattr(os, name) for name in ("open", "write", "fsync", "fdatasync", "close", "dup")}
        replace_path = Path.replace

        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            descriptor = int(real["open"](path, flags, *args, **kwargs))
            place = Path(path)
            if place == self.directory:
                self.opened[descriptor] = None
            elif place.parent == self.directory and not place.name.startswith("lock"):
                if place.name not in self.names:
                    self.names[place.name] = len(self.data)
                    self.data[len(self.data)] = b""
                    self.renamed()
                self.opened[descriptor] = self.names[place.name]
            return descriptor

        def write(descriptor: int, data: Any) -> int:
            count = int(real["write"](descriptor, data))
            number = self.opened.get(descriptor)
            if number is not None:
                self.data[number] += bytes(data)[:count]
                after()
            return count

        def flush(descriptor: int) -> None:
            real["fsync"](descriptor)
            if descriptor in self.opened:
                number = self.opened[descriptor]
                if number is None:
                    self.durable, self.pending = dict(self.names), []
                else:
                    self.flushed[number] = len(self.data[number])
                after()

        def dup(descriptor: int) -> int:
            copy = int(real["dup"](descriptor))
            if descriptor in self.opened:
                self.opened[copy] = self.opened[descriptor]
            return copy

        def close(descriptor: int) -> None:
            self.opened.pop(descriptor, None)
            real["close"](descriptor)

        def moved(source: Path, target: Path) -> Path:
            found = replace_path(source, target)
            self.names[target.name] = self.names.pop(source.name)
            self.renamed()
            after()
            return found

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "fdatasync", flush)
        monkeypatch.setattr(os, "dup", dup)
        monkeypatch.setattr(os, "close", close)
        monkeypatch.setattr(Path, "replace", moved)


def test_power_failure_at_any_moment_loses_nothing_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REWRITE", 6)  # so that the log is rewritten often
    directory = tmp_path / "state"
    directory.mkdir()
    disk = Disk(directory)
    acknowledged: dict[int, str] = {}
    found: list[tuple[dict[str, bytes], dict[int, str]]] = []
    clock = Clock()
    with monkeypatch.context() as patched:
        disk.watch(patched, lambda: found.extend((state, dict(acknowledged)) for state in disk.states()))
        store = Store(directory, "boot", clock)
        for number in range(24):
            entry = reserve(store, f"c{number}")
            store.sync()
            acknowledged[entry.serial] = "adding"
            entry = finish(store, entry, ADDED)
            if number % 3:
                finish(store, entry, GONE)
                store.sync()
                acknowledged[entry.serial] = GONE
            clock.now += 10
        store.close()
    assert len(found) > 200
    order = {"adding": 0, ADDED: 1, GONE: 2}
    for number, (state, promised) in enumerate(found):
        place = tmp_path / f"after{number}"
        place.mkdir()
        for name, data in state.items():
            (place / name).write_bytes(data)
        again = Store(place, "boot", lambda: 0.0)  # a clock that lets nothing expire
        ledger = again.look()
        for serial, at_least in promised.items():
            held = ledger.entries.get(serial)
            if held is None:  # only a tombstone that has cooled down may have been left out
                assert at_least == GONE, (number, serial)
            else:
                assert order[held.state] >= order[at_least], (number, serial)
        holders = [address for entry in ledger.live.values() for address in entry.addresses]
        assert len(holders) == len(set(holders))
        reserve(again, "next")  # and it can be written
        again.close()


def test_damage_is_passed_over_and_repaired(tmp_path: Path) -> None:
    store = Store(tmp_path, "boot", Clock())
    for name in ("a", "b"):
        finish(store, reserve(store, name), ADDED)
    store.close()
    log = tmp_path / LOG
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[1] + b"\0" * 100 + b"\nnonsense\n" + lines[2] + lines[3][:20])
    store = Store(tmp_path, "boot", Clock())
    assert {key[0] for key in store.look().live} == {"a", "b"}
    finish(store, reserve(store, "c"), ADDED)
    store.close()
    assert b"nonsense" not in log.read_bytes()
    again = Store(tmp_path, "boot", Clock())
    assert {key[0] for key in again.look().live} == {"a", "b", "c"}
    again.close()


def test_several_stores_of_one_directory_see_each_other(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "REWRITE", 8)
    stores = [Store(tmp_path, "boot", Clock()) for _ in range(4)]
    found: list[Entry] = []
    guard = threading.Lock()

    def work(store: Store, label: int) -> None:
        for number in range(20):
            entry = finish(store, reserve(store, f"{label}-{number}"), ADDED)
            with guard:
                found.append(entry)

    threads = [threading.Thread(target=work, args=(s, n)) for n, s in enumerate(stores * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    addresses = [address for entry in found for address in entry.addresses]
    assert len(addresses) == len(set(addresses)) == 2 * 160
    for store in stores:
        assert len(store.look().live) == 160
        store.close()


def test_failed_write_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, "boot", Clock())
    reserve(store, "a")
    before = (tmp_path / LOG).read_bytes()
    real = os.write

    def half(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(CniError) as caught:
            reserve(store, "b")
    assert caught.value.code == 5
    assert (tmp_path / LOG).read_bytes() == before
    assert reserve(store, "b").serial == 2
    store.close()


def test_directory_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "state", "boot", Clock())
    reserve(store, "a")
    shutil.rmtree(tmp_path / "state")
    assert not store.look().live
    other = Store(tmp_path / "state", "boot", Clock())
    assert reserve(store, "b").addresses != reserve(other, "c").addresses
    assert {key[0] for key in store.look().live} == {"b", "c"}
    store.close()
    other.close()


# The ledger


def test_entries_of_an_earlier_boot_are_gone_and_the_turn_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path, "boot", Clock())
    last = finish(store, reserve(store, "a"), ADDED)
    store.close()
    again = Store(tmp_path, "another boot", Clock())
    assert not again.look().live
    with again.transaction() as change:
        fresh = change.ledger.reserve(replace(draft("b"), boot="another boot"), PREFIXES, ())
    assert fresh.addresses[0] == last.addresses[0] + 1
    again.close()


@pytest.mark.parametrize("after", [0, 3, 5], ids=["beginning", "middle", "end"])
def test_turn_from_beginning_middle_and_end(after: int) -> None:
    prefix = ipaddress.ip_network("10.0.0.0/29")
    ledger = Ledger("boot")
    for number in range(after):
        ledger.apply(ledger.reserve(draft(f"c{number}"), [prefix], ()))
    found = ledger.reserve(draft("next"), [prefix], ())
    assert found.addresses == (ipaddress.ip_address(f"10.0.0.{after + 1}"),)


def test_cool_down_ends_after_its_time() -> None:
    prefix = ipaddress.ip_network("10.0.0.0/30")
    ledger = Ledger("boot")
    first = ledger.reserve(draft("a", 0.0), [prefix], ())
    ledger.apply(first)
    ledger.apply(replace(first, state=GONE, changed=1.0))
    second = ledger.reserve(draft("b", 2.0), [prefix], ())
    assert second.addresses != first.addresses
    ledger.apply(second)
    assert ledger.reserve(draft("c", 3.0), [prefix], ()).addresses == first.addresses  # nothing else is left
    ledger.expire(1.5 + COOL_DOWN)
    assert not ledger.cooling


def test_repetition_for_the_same_container_is_refused() -> None:
    ledger = Ledger("boot")
    ledger.apply(ledger.reserve(draft("a"), PREFIXES, ()))
    with pytest.raises(CniError) as caught:
        ledger.reserve(draft("a"), PREFIXES, ())
    assert caught.value.code == 100
    assert len(ledger.used) == 2
