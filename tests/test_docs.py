"""What the documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def code(text: str) -> list[str]:
    """Return what stands in backquotes outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def test_every_test_that_the_security_document_names_exists() -> None:
    file, missing, seen = "", [], 0
    for word in code((ROOT / "docs/security.md").read_text()):
        name, _, function = word.partition("::")
        if not name.endswith(".py") and not function:
            continue
        file = name or file
        path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / file
        seen += 1
        if not path.exists() or (function and f"def {function}(" not in path.read_text()):
            missing.append(word)
    assert not missing
    assert seen > 50


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_every_path_and_target_that_a_document_names_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for word in code(document.read_text()):
        if match := re.fullmatch(r"make ([a-z-]+)", word):
            wrong += [word] if match[1] not in targets else []
        elif re.fullmatch(
            r"(docs|tests|benchmarks|systemd|deploy|wire|host|meshd|cni|sched|lab|cli|latency|rendezvous)/[\w./-]+",
            word,
        ):
            wrong += [word] if not (ROOT / word).exists() else []
    assert not wrong
