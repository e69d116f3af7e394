"""Charts of the report: points are where they belong, whatever the figures."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from fedmutual.report.charts import Line, client_chart, line_chart, look


def test_lines_can_be_told_apart() -> None:
    assert len({look(position) for position in range(12)}) == 12


def test_points_are_where_they_belong() -> None:
    svg = client_chart({"a": {1: 0.0, 2: 100.0}}, ["a"], "%")
    assert svg is not None
    (points,) = re.findall(r'<polyline class="c0" points="([^"]*)"', svg)
    (x1, y1), (x2, y2) = ([float(v) for v in p.split(",")] for p in points.split())
    assert x1 < x2
    assert (y1, y2) == (236.0, 8.0)  # 0 % on the bottom edge, 100 % on the top one: no room beyond either
    assert "a, round 2: 100" in svg


def test_spikes_are_thick_between_before_and_after() -> None:
    svg = client_chart({"a": {1: 1.0, 1.5: 2.0, 2: 1.0, 2.5: 3.0}}, ["a"], "nats", teeth=True)
    assert svg is not None
    assert svg.count('class="c0 thick"') == 2
    assert "after the mutual step of round 2: 3" in svg


CURVE = st.dictionaries(st.integers(1, 300).map(float), st.floats(-1e12, 1e12), min_size=1, max_size=20)


@settings(max_examples=60)
@given(CURVE, st.none() | st.integers(1, 301), st.booleans())
def test_any_curve_is_inside_the_drawing(curve: dict[float, float], end: int | None, teeth: bool) -> None:
    svg = line_chart([Line("a", curve, "c0", teeth=teeth)], "nats", end=end)
    for points in re.findall(r' points="([^"]*)"', svg):
        for x, y in (point.split(",") for point in points.split()):
            assert 0 <= float(x) <= 460
            assert 0 <= float(y) <= 270
    assert svg.count("<text") < 40
