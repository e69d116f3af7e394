"""The report's style sheet. A Python file, because a Flower app bundle holds no .css."""

# ruff: noqa: E501  a rule on one line reads better than one that is broken

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b2430; --soft: #5b6675; --edge: #dfe3e8; --grid: #e6e9ed;
  --heat: #2f7fd6; --good: #14774a; --bad: #b3261e; --warn-page: #fff5dc; --warn-edge: #e5c469;
  --k: #1b2430;
  --c0: #0072b2; --c1: #c47200; --c2: #00885f; --c3: #b8548e; --c4: #2a8fca; --c5: #c94f00; --c6: #7a6a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151a; --card: #1a2027; --text: #e6eaef; --soft: #9aa6b4; --edge: #2d3641; --grid: #2b333d;
    --heat: #2f79c4; --good: #57c792; --bad: #ff8a80; --warn-page: #2d2614; --warn-edge: #6e5a22;
    --k: #f2f4f7;
    --c0: #4aa8e8; --c1: #f0ae3c; --c2: #35c795; --c3: #e28bbb; --c4: #8fd0f5; --c5: #f58549; --c6: #cdb93f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 30px 0 8px; scroll-margin-top: 12px; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 4px 0; max-width: 75ch; }
a { color: var(--c0); }
.soft, .note { color: var(--soft); }
.note { font-size: .88rem; }
.run { border-top: 1px solid var(--edge); margin-top: 40px; padding-top: 26px; }
.run:first-child { border: 0; margin-top: 0; padding-top: 0; }
nav { margin: 10px 0; } nav a { margin-right: 14px; }
.badge { font-size: .8rem; font-weight: 600; padding: 2px 9px; border-radius: 999px; border: 1px solid;
  vertical-align: middle; white-space: nowrap; }
.completed { color: var(--good); } .failed, .stopped { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(116px, 1fr)); gap: 10px; margin: 14px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tile { padding: 8px 9px; }
.tile b { display: block; font-size: 1.04rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { color: var(--soft); font-size: .8rem; }
.card { padding: 12px 14px; min-width: 0; }
.warn { background: var(--warn-page); border: 1px solid var(--warn-edge); border-radius: 10px;
  padding: 8px 14px; margin: 10px 0; overflow-wrap: anywhere; }
.warn p, .warn li { max-width: none; } .warn ul { margin: 4px 0; padding-left: 20px; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
.small { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.tall { max-height: 70vh; overflow-y: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
.wide { width: 100%; }
th, td { padding: 4px 9px; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .left { text-align: left; }
thead th { border-bottom: 1px solid var(--edge); vertical-align: bottom; }
tbody tr + tr td, tbody tr + tr th { border-top: 1px solid var(--grid); }
tfoot tr:first-child td { border-top: 2px solid var(--edge); }
tfoot td { color: var(--soft); } tfoot td + td { color: var(--text); font-weight: 600; }
.unfinished { opacity: .6; }
.heat td { text-align: center; padding: 5px 10px; border: 1px solid var(--card); min-width: 44px; }
.heat td[style] { background: color-mix(in srgb, var(--heat) calc(var(--s) * 62%), transparent); }
.heat tbody th, .heat thead th { border: 0; font-weight: 500; max-width: 130px; overflow: hidden;
  text-overflow: ellipsis; }
.heat thead th { text-align: center; }
i { font-style: normal; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 8px 0 12px; font-size: .9rem; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .k { color: var(--k); }
.sample { display: grid; grid-template-columns: 96px 1fr; gap: 12px; align-items: start; }
.sample img { width: 96px; height: 96px; object-fit: contain; border-radius: 6px; background: var(--grid); }
.sample .name { font-weight: 600; overflow-wrap: anywhere; line-height: 1.3; }
.sides { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .86rem; margin-top: 4px; }
.sides div { min-width: 0; } .voter { white-space: nowrap; margin-right: 9px; }
details { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 8px 14px; margin: 10px 0; }
summary { cursor: pointer; font-weight: 600; }
.keys { display: grid; gap: 12px 26px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); margin-top: 8px; }
.keys table { width: 100%; font-size: .84rem; }
.keys td { white-space: normal; overflow-wrap: anywhere; padding: 2px 0; text-align: left; vertical-align: top; }
.keys td + td { text-align: right; padding-left: 12px; }
code, pre { font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; padding: 9px 13px; margin: 10px 0; }
@media (max-width: 560px) {
  main { padding: 14px 12px 36px; } h1 { font-size: 1.35rem; }
  .tiles { grid-template-columns: repeat(3, 1fr); gap: 8px; }
  .tile { padding: 6px 9px; } .tile b { font-size: 1rem; } .tile span { font-size: .74rem; }
  svg text { font-size: 14.5px; }
  .card { padding: 10px; } th, td { padding: 4px 7px; }
}
@media print { .card, .tile { break-inside: avoid; } body { background: none; } }
"""
