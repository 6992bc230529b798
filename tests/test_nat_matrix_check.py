"""What `make check-nat-matrix` takes for another table, and what for the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TABLE = """<!-- nat-matrix -->
| one side | other side | how | direct | s, p50 | s, p95 | packets, p50 | p95 |
|---|---|---|---|---|---|---|---|
| linux | linux | by theory | 100.0 % | 0.23 | 0.99 | 25 | 33 |
| linux | corporate | by a guess | 100.0 % | 1.40 | 3.04 | 560 | 1426 |
| corporate | corporate | relay | 0.0 % | – | – | 16 | 20 |
<!-- /nat-matrix -->"""


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        ("", "", False),
        ("1.40", "1.51", False),
        ("guess | 100.0", "guess | 99.5", False),
        ("guess | 100.0", "guess | 97.0", True),
        ("theory | 100.0", "theory | 99.5", True),
        ("1.40", "2.40", True),
        ("| 25 |", "| 45 |", True),
        ("relay | 0.0 % | –", "by a guess | 1.0 % | 0.5", True),
        ("| corporate | corporate", "| corporate | linux", True),
    ],
)
def test_check_tells_another_table_from_noise(repository: Path, old: str, new: str, differs: bool) -> None:
    spec = importlib.util.spec_from_file_location("nat_matrix", repository / "benchmarks/nat_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert bool(module.differences(TABLE, TABLE.replace(old, new) if old else TABLE)) is differs
