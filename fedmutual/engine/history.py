"""The line of ``history.jsonl`` that records a reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmutual.learning.competence import balanced_accuracy
from fedmutual.learning.consensus import prediction_shares
from fedmutual.wire.exchange import Reply
from fedmutual.wire.records import Metrics
from fedmutual.wire.reports import Report, unseen_payload_bytes

Line = dict[str, Any]


class History:
    """Turns replies into lines, and keeps each client's last validation metrics.

    A mutual step is compared with the client's validation at the end of the previous round, which the server
    keeps, so it is not sent twice.
    """

    def __init__(self, last: Mapping[str, Line] | None = None) -> None:
        self.last: dict[str, Line] = dict(last or {})

    def line(
        self, reply: Reply, name: str | None, report: Report | None, reason: str, round: int, closing: bool
    ) -> Line:
        """Return the line of a reply; a rejected one has the reason and no figures."""
        line: Line = {
            "round": round,
            "closing": closing,
            "client": name,
            "node_id": reply.node_id,
            "uplink_bytes": reply.uplink_bytes,
            "downlink_bytes": reply.downlink_bytes,
            "round_trip_seconds": reply.seconds,
        }
        if report is None:
            return line | {"rejected": reason}
        # a client's figures never overwrite the server's own
        line = {**line, "model": report.architecture} | _figures(report) | line
        if report.private_digest:
            line["private_digest"] = report.private_digest
        if report.unseen_predictions is not None:
            line["unseen_num_examples"] = len(report.unseen_predictions)
            # evaluation of the ensemble is not learning: count its bytes separately
            line["evaluation_bytes"] = unseen_payload_bytes(report)
            line["uplink_bytes"] -= line["evaluation_bytes"]
        before = self.last.get(report.client, {})
        if "kl_before" in line:
            line |= {f"{key}_before": value for key, value in before.items()}
        measured = {key: line.get(f"validation_{key}") for key in ("loss", "accuracy")}
        self.last[report.client] = {key: value for key, value in measured.items() if value is not None}
        return line


def figures(metrics: Metrics) -> Line:
    """Return metrics with the names of the history."""
    line: Line = {key.replace("-", "_"): value for key, value in metrics.items()}
    for split in ("validation", "unseen"):
        recall = line.get(f"{split}_recall")
        if recall is not None:
            line[f"{split}_recall"] = [value if value >= 0 else None for value in recall]
            line[f"{split}_balanced_accuracy"] = balanced_accuracy(metrics, split)
    return line


def _figures(report: Report) -> Line:
    line = figures(report.metrics)
    if len(report.predictions):
        line["prediction_shares"] = prediction_shares(report.predictions)
    return line
