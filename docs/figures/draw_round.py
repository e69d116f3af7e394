"""Draw round.svg, the picture of one round: python docs/figures/draw_round.py"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).with_name("round.svg")
WIDTH, HEIGHT = 860, 420
SITES = (("clinic-a", "ResNet-18"), ("clinic-b", "VisionNet"), ("clinic-c", "MobileNetV3"))
INK, FAINT, SEND, RETURN, PAPER = "#1f2937", "#64748b", "#0f766e", "#b45309", "#ffffff"
LEFT, TOP, BOX, GAP = 20, 218, 260, 20  # the sites' boxes
BARS = ((0.86, 0.14), (0.35, 0.65), (0.95, 0.05))  # predicted shares of two classes, an example


def draw() -> str:
    """The picture as SVG."""
    middle = WIDTH / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"',
        ' font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">',
        "<title>One round: predictions on public images go up, the others' consensus comes back</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="{PAPER}"/>',
        _arrow("send", SEND),
        _arrow("return", RETURN),
        _box(middle - 210, 18, 420, 84, "#eef2ff"),
        _text(middle, 46, "server", 17, INK, weight=600, anchor="middle"),
        _text(middle, 70, "for each site, the mean of what the others predict", 14, INK, anchor="middle"),
        _text(middle, 90, "holds no model, no weights, no private image", 12.5, FAINT, anchor="middle"),
    ]
    for number, (name, model) in enumerate(SITES):
        parts += _site(LEFT + number * (BOX + GAP), name, model, BARS[number], middle)
    parts += [
        _text(LEFT, 44, "up: predictions", 14, SEND, weight=600),
        _text(LEFT, 64, "on the public images,", 13, SEND),
        _text(LEFT, 82, "2 bytes each (two classes)", 13, SEND),
        _text(WIDTH - LEFT, 44, "back: the consensus", 14, RETURN, weight=600, anchor="end"),
        _text(WIDTH - LEFT, 64, "of the others, which each", 13, RETURN, anchor="end"),
        _text(WIDTH - LEFT, 82, "site is pulled towards", 13, RETURN, anchor="end"),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _site(x: float, name: str, model: str, shares: tuple[float, float], server: float) -> list[str]:
    top, centre = TOP, x + BOX / 2
    foot = server + (centre - server) * 0.55
    lines = [
        _line(centre - 10, top - 6, foot - 10, 108, SEND, "send"),
        _line(foot + 10, 108, centre + 10, top - 8, RETURN, "return"),
        _box(x, top, BOX, 182, "#f8fafc"),
        _text(x + 16, top + 28, name, 16, INK, weight=600),
        _text(x + BOX - 16, top + 28, model, 13, FAINT, anchor="end"),
        _text(x + 16, top + 58, "predicts the public images", 12.5, INK),
    ]
    for index, share in enumerate(shares):
        y = top + 68 + index * 14
        lines.append(f'<rect x="{x + 16}" y="{y}" width="{BOX - 32}" height="9" rx="4" fill="#e2e8f0"/>')
        lines.append(
            f'<rect x="{x + 16}" y="{y}" width="{(BOX - 32) * share:.1f}" height="9" rx="4" fill="{SEND}"/>'
        )
    lines += [
        f'<line x1="{x + 16}" y1="{top + 106}" x2="{x + BOX - 16}" y2="{top + 106}" stroke="#cbd5e1"/>',
        _text(x + 16, top + 128, "stay here: private images, labels,", 12.5, INK),
        _text(x + 16, top + 146, "weights, gradients", 12.5, INK),
        _text(x + 16, top + 168, "every step learns from both", 12.5, FAINT),
    ]
    return lines


def _text(
    x: float, y: float, text: str, size: float, fill: str, *, weight: int = 400, anchor: str = "start"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} rx="10" fill="{fill}" stroke="#94a3b8"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, arrow: str) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:g}" x2="{x2:.1f}" y2="{y2:g}"'
    return f'<line {place} stroke="{colour}" stroke-width="2.2" marker-end="url(#{arrow})"/>'


def _arrow(name: str, colour: str) -> str:
    head = f'<path d="M0 0 L8 4 L0 8 z" fill="{colour}"/>'
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" '
        f'orient="auto">{head}</marker>'
    )


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
    print(FILE)
