"""Plain averaging of weights."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord

from fedmutual.wire.reports import Report
from fedmutual.wire.weights import declared, read_array

logger = logging.getLogger(__name__)


def average(reports: Mapping[str, Report]) -> ArrayRecord | None:
    """Unweighted mean of the clients' weights; None where there are none.

    Clients with another architecture than most are left out, and named in the log.
    """
    layers = {name: declared(report.model) for name, report in reports.items() if report.model is not None}
    if not layers:
        return None
    most = Counter(layers.values()).most_common(1)[0][0]
    left_out = [name for name in reports if layers.get(name) != most]
    if left_out:
        logger.warning("average_weights: %s: no weights, or another architecture's", ", ".join(left_out))
    sums: dict[str, np.ndarray] = {}
    count = 0
    for name, report in reports.items():
        if name in left_out or report.model is None:
            continue
        count += 1
        for key, shape, dtype in most:
            values = read_array(key, report.model[key], shape, dtype).astype(np.float64)
            sums[key] = sums[key] + values if key in sums else values
    return ArrayRecord({key: Array((sums[key] / count).astype(dtype)) for key, _, dtype in most})
