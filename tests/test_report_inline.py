"""Charts inside the page: they hold the figures, take the page's colours, and survive any figures."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from fedmutual.report.curves import Curves
from fedmutual.report.inline import inline_chart, look
from fedmutual.report.plots import draw_clients
from fedmutual.report.style import STYLE


def chart(curves: Curves, end: int | None = None, teeth: bool = False, label: str = "Loss") -> str:
    svg = inline_chart(lambda axes: draw_clients(axes, curves, list(curves), teeth), label, end)
    assert svg is not None
    return svg


def test_lines_can_be_told_apart() -> None:
    assert len({look(position) for position in range(12)}) == 12


def test_points_are_where_they_belong_and_say_their_values() -> None:
    svg = chart({"<b>": {1: 0.0, 2: 100.0}}, end=2)
    dots = re.findall(r'<use [^>]*x="([^"]*)" y="([^"]*)"[^>]*><title>([^<]*)', svg)
    (x1, y1, first), (x2, y2, second) = dots
    assert float(x1) < float(x2) < 460
    assert 270 > float(y1) > float(y2) > 0
    assert (first, second) == ("&lt;b&gt;, round 1: 0", "&lt;b&gt;, round 2: 100")
    assert ">end<" in svg


def test_a_mutual_step_is_solid_and_the_training_after_it_dotted() -> None:
    svg = chart({"a": {1: 1.0, 1.5: 2.0, 2: 1.0, 2.5: 3.0}}, teeth=True)
    drawn = re.findall(r'<path d="([^"]*)" style="([^"]*var\(--c0\)[^"]*)"', svg)
    dotted, solid = (path.count("M") for path, style in drawn if "fill: none" in style)
    assert (dotted, solid) == (1, 2)  # one line; two pieces
    assert "a, round 2.5: 3" in svg


def test_a_long_line_has_few_dots_each_with_its_own_value() -> None:
    svg = chart({"a": {float(x): float(x) for x in range(1, 301)}})
    said = re.findall(r"a, round (\d+): (\d+)<", svg)
    assert 20 < len(said) <= 40
    assert all(x == y for x, y in said)


def test_the_page_gives_every_colour_its_two_values() -> None:
    many = {f"client-{i}": {1: i / 100, 2: 0.5} for i in range(60)}
    few = {name: many[name] for name in list(many)[:12]}
    for svg in (chart(many), chart(few)):
        assert "#" not in re.sub(r'(id="|href="#)\w+', "", svg)  # no colour of its own
        for name in set(re.findall(r"var\((--\w+)\)", svg)):
            assert STYLE.count(f"{name}: #") == 2


def test_no_two_charts_share_an_id() -> None:
    curves = {"a": {1: 1.0, 2: 2.0}}
    ids = [set(re.findall(r' id="([^"]*)"', chart(curves, label=label))) for label in ("one", "two")]
    assert ids[0]
    assert not ids[0] & ids[1]


CURVE = st.dictionaries(st.integers(1, 300).map(float), st.floats(-1e12, 1e12), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None)
@given(CURVE, st.none() | st.integers(1, 301), st.booleans())
def test_any_curve_is_inside_the_drawing(curve: dict[float, float], end: int | None, teeth: bool) -> None:
    steps = {x + half: y for x, y in curve.items() for half in (0, 0.5)}
    svg = chart({"a": steps if teeth else curve}, end, teeth)
    for x, y in re.findall(r'<use [^>]*x="([^"]*)" y="([^"]*)"', svg):
        assert 0 <= float(x) <= 460
        assert 0 <= float(y) <= 270
    assert svg.count("<text") < 40
