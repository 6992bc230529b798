"""The rooms are installed under one namespace and hide nothing of the standard library."""

import configparser
import sched
import sysconfig
from pathlib import Path


def test_standard_library_sched_is_not_hidden() -> None:
    assert Path(sched.__file__).is_relative_to(sysconfig.get_path("stdlib"))
    assert sched.scheduler().empty()


def test_every_room_is_packaged_and_typed(repository: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(repository / "setup.cfg")
    packages = setup["options"]["packages"].split()
    rooms = {f"crossedge.{path.parent.name}" for path in repository.glob("*/__init__.py")} - {
        "crossedge.crossedge"
    }
    assert rooms <= set(packages)
    for name in rooms:
        room = name.removeprefix("crossedge.")
        assert (repository / room / "py.typed").exists()
        assert (repository / "tests" / "typeroot" / "crossedge" / room).resolve() == repository / room


def test_only_the_host_room_talks_to_the_kernel(repository: Path) -> None:
    doors = ("AF_NETLINK", "ioctl(", "setns(", "libnftables", "/proc/sys/")
    for room in ("wire", "rendezvous", "latency", "meshd", "lab", "cli"):
        for file in (repository / room).glob("*.py"):
            text = file.read_text()
            assert not [door for door in doors if door in text], file
