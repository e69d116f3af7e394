"""Turn formulas into MathML, which browsers draw themselves: no script, no fonts, no network."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

# what pymdownx.arithmatex (generic) makes of $...$ and $$...$$
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **_: object) -> str:
    """MkDocs calls this with a page's HTML."""
    return _FORMULA.sub(_as_mathml, content)


def _as_mathml(match: re.Match[str]) -> str:
    tex, tag = html.unescape(match["tex"]).strip(), match["tag"]
    display = "block" if match["open"] == "[" else "inline"
    return f'<{tag} class="arithmatex">{convert(tex, display=display)}</{tag}>'
