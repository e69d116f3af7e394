"""What ``fedmutual audit`` has found, as rows for people: on the terminal and in the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = tuple[str, str, str]  # what is told, how well, what to know of it


def leak_rows(audit: Mapping[str, Any]) -> list[Row]:
    """Return a row for each finding of ``audit.json``."""
    return [(entry["of"], figures_text(entry["figures"]), entry["note"]) for entry in audit["findings"]]


def figures_text(figures: Mapping[str, Any]) -> str:
    """Say the figures of a finding in a line; ``-`` where there are none."""
    f = figures
    if "auc" in f:
        return (
            f"AUC {f['auc']:.3f} {_interval(f['auc_interval'])}; TPR at 1 % FPR {100 * f['tpr']:.1f} % "
            f"{_interval([100 * value for value in f['tpr_interval']], 1)}; {f['members']} members, "
            f"{f['others']} others"
        )
    if "auc_at_most" in f:
        return f"AUC at most {f['auc_at_most']:.3f}; TPR at 1 % FPR at most {100 * f['tpr_at_most']:.1f} %"
    if "calibrated" in f:
        face = f["at_face_value"]
        first = "R2" if face is None else f"R2 at face value {face:.2f},"
        by_chance = f"(by chance {f['chance']:.2f}); {f['clients']} clients"
        return f"{first} calibrated {f['calibrated']:.2f} {by_chance}"
    if "exact" in f:
        return f"exactly, of {f['exact']} of {f['clients']} clients"
    if "explained" in f:
        particular = f"R2 {f['explained']:.2f} of what is particular to a client"
        return f"{particular}; largest error {f['largest_error']:.4f}"
    return "-"


def _interval(values: Any, digits: int = 3) -> str:
    low, high = values
    return f"[{low:.{digits}f}, {high:.{digits}f}]"
