"""Counters by name, and the text that Prometheus reads (exposition format 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SERIES_MAX: Final = 1000
"""Label values of one counter; names come from our own code, so this is a guard, not a limit."""


class Counters:
    """What happened how often: a name, and one label value such as the reason of a drop."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, float]] = {}

    def add(self, name: str, label: str = "", amount: float = 1.0) -> None:
        """Count; `label` is the value of the counter's one label."""
        series = self._values.setdefault(name, {})
        if label not in series and len(series) >= SERIES_MAX:
            label = "other"
        series[label] = series.get(label, 0.0) + amount

    def get(self, name: str, label: str = "") -> float:
        """Return a count, 0 where there is none."""
        return self._values.get(name, {}).get(label, 0.0)

    def series(self, name: str) -> Mapping[str, float]:
        """Return label value to count."""
        return self._values.get(name, {})


COUNTERS: Final[Mapping[str, tuple[str, str]]] = {
    "reports_total": ("result", "Reports, by what became of them."),
    "rounds_total": ("result", "Rounds, by how they ended."),
    "moves_total": ("kind", "Replicas that moved by choice, were replaced, or opened."),
    "requests_total": ("status", "HTTP requests, by status."),
    "extender_total": ("call", "Calls by kube-scheduler, by what became of them."),
    "history_errors_total": ("what", "Writes to the history that failed."),
    "placements_total": ("result", "Dry runs, by how they ended."),
    "kubernetes_patches_total": ("result", "Patches of Kubernetes nodes, by how they ended."),
}
"""Name without prefix, to the name of its label and a help text."""


def escaped(text: str) -> str:
    """Return a label value as the format wants it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def line(name: str, labels: Mapping[str, str], value: float) -> str:
    """Return one sample."""
    inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
    return f"crossedge_sched_{name}{'{' + inside + '}' if inside else ''} {value:.10g}"


def rendered(
    counters: Counters, gauges: Iterable[tuple[str, str, Iterable[tuple[Mapping[str, str], float]]]]
) -> str:
    """Return the page: all counters, and gauges given as (name, help, samples)."""
    lines: list[str] = []
    for name, (label, text) in COUNTERS.items():
        lines += [f"# HELP crossedge_sched_{name} {text}", f"# TYPE crossedge_sched_{name} counter"]
        lines += [line(name, {label: value}, count) for value, count in sorted(counters.series(name).items())]
    for name, text, samples in gauges:
        lines += [f"# HELP crossedge_sched_{name} {text}", f"# TYPE crossedge_sched_{name} gauge"]
        lines += [line(name, labels, value) for labels, value in samples]
    return "\n".join(lines) + "\n"
