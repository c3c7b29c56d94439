"""Draw the plots of the guide "Read more than your memory holds" from the stored results of the benchmarks.

    python docs/plots.py

Reads benchmarks/results/{long_context,retrieval,lacache_map}.json and writes docs/guides/memory-*.svg.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from gratis.trials.plots import WIDE, Line, line_plot
from gratis.trials.trial import SeriesRecord

ROOT = Path(__file__).parents[1]
RESULTS, GUIDES = ROOT / "benchmarks" / "results", ROOT / "docs" / "guides"
WINDOW = 8192
COLOURS = {"full cache": "c0", "sliding window": "c2", "LaCache": "c3", "InfLLM": "c1", "block top-k": "c4"}
STYLE = """
svg { --paper: #fff; --ink: #1b1d22; --soft: #5c626d; --rule: #c9c6bd; --grid: #ebe9e3; --better: #cfeedd; --worse: #f7d6d2;
  --c0: #7a808c; --c1: #1f5fd6; --c2: #d0620f; --c3: #0b8072; --c4: #8a3fc4; }
@media (prefers-color-scheme: dark) { svg { --paper: #14161a; --ink: #e9e8e4; --soft: #a0a6b1; --rule: #4a4f58;
  --grid: #2a2e35; --better: #1d4a33; --worse: #5a2723;
  --c0: #979daa; --c1: #7da7ff; --c2: #f19a52; --c3: #4cc2b0; --c4: #c497f0; } }
text { font: 13px system-ui, sans-serif; fill: var(--soft); } .label { fill: var(--ink); }
.paper { fill: var(--paper); } .grid { stroke: var(--grid); } .base { stroke: var(--rule); }
.mark { stroke: var(--soft); stroke-dasharray: 3 4; } .line { fill: none; stroke: var(--k); stroke-width: 2.2; }
.dot { fill: var(--k); } .key { fill: var(--k); } .better { fill: var(--better); } .worse { fill: var(--worse); }
.even { fill: var(--grid); }
.c0 { --k: var(--c0); } .c1 { --k: var(--c1); } .c2 { --k: var(--c2); } .c3 { --k: var(--c3); } .c4 { --k: var(--c4); }
"""


def main() -> None:
    for name, picture in pictures().items():
        path = GUIDES / f"memory-{name}.svg"
        path.write_text(picture, encoding="utf-8")
        print(path.relative_to(ROOT))


def pictures() -> dict[str, str]:
    """SVG by name; what was not measured yet is not drawn."""
    long, recalled, ladder = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("long_context", "retrieval", "lacache_map")
    )
    made = {"recall": recall(recalled)}
    if times := _table(long, "time per decoded token"):
        made["time"] = lines(times, "history", "tokens read before", "time per token (ms)")
    if prose := _table(ladder, "loss in nats"):
        made["map"] = heat_map(prose)
    streams = {"loss": ("loss of each stretch", "loss (nats)"), "memory": ("memory of the process", "memory (MB)")}
    for name, (title, unit) in streams.items():
        if rows := _table(long, title):
            made[name] = lines(rows, "read", "tokens read", unit, marks=[(WINDOW, "trained window")])
    return made


def _table(results: dict[str, Any], title: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = next((value for key, value in results.items() if key.startswith(title)), [])
    return rows


def lines(
    rows: Sequence[dict[str, Any]], x: str, x_label: str, y_label: str, marks: Sequence[tuple[float, str]] = ()
) -> str:
    """A line per column of a table."""
    names = [name for name in rows[0] if name != x]
    drawn = []
    for name in names:
        known = [(row[x], row[name]) for row in rows if name in row]
        series = SeriesRecord(
            x=[a for a, _ in known], y=[b for _, b in known], x_label=x_label, y_label=y_label, marks=list(marks)
        )
        label = name.removesuffix(", ms")
        drawn.append(Line(label, COLOURS[label.partition(",")[0]], series))
    return standalone(line_plot(drawn, WIDE), [(line.label, line.colour) for line in drawn])


def recall(results: dict[str, Any]) -> str:
    """How many hidden numbers each arm found, by length of the text and depth; green where it found all."""
    settings = [(key, value) for key, value in results.items() if "tokens" in key and isinstance(value, list)]
    depths = results["depths"]
    left, top, width, height, line = 170, 34, 110, 34, 0
    parts = [
        f'<text x="{left + place * width + 6}" y="20">depth {depth:.0%}</text>' for place, depth in enumerate(depths)
    ]
    for title, rows in settings:
        parts.append(f'<text x="4" y="{top + line * height + 21}">{escape(title)}</text>')
        line += 1
        for row in rows:
            y, each = top + line * height, row["of"] // len(depths)
            parts.append(f'<text class="label" x="4" y="{y + 21}">{escape(row["arm"])}</text>')
            for place, found in enumerate(row["found by depth"]):
                kind, x = "better" if found == each else "worse" if not found else "even", left + place * width
                parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width - 3}" height="{height - 3}" rx="4"/>')
                parts.append(f'<text class="label" x="{x + 10}" y="{y + 21}">{found} of {each}</text>')
            low, high = row["interval"]
            said = f"{row['found']} of {row['of']}, 95 % interval {low:.2f} to {high:.2f}"
            parts.append(f'<text x="{left + len(depths) * width + 10}" y="{y + 21}">{said}</text>')
            line += 1
    size = (left + len(depths) * width + 260, top + line * height + 8)
    drawn = f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="numbers found by depth">'
    return standalone(drawn + "".join(parts) + "</svg>", [])


def heat_map(rows: Sequence[dict[str, Any]]) -> str:
    """LaCache minus sliding window by text, budget and ladder; coloured where the interval excludes zero."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    ladders = [key.removesuffix(": difference") for key in rows[0] if key.endswith(": difference")]
    left, top, width, height = 140, 52, 130, 34
    parts = []
    for group, ladder in enumerate(ladders):
        start = left + group * len(budgets) * width
        parts.append(f'<text class="label" x="{start + 6}" y="18">{escape(ladder)}</text>')
        for place, budget in enumerate(budgets):
            parts.append(f'<text x="{start + place * width + 6}" y="40">budget {budget}</text>')
            for line, text in enumerate(texts):
                row = next(r for r in rows if r["text"] == text and r["budget"] == budget)
                low, high = row[f"{ladder}: interval"]
                kind = "better" if high < 0 else "worse" if low > 0 else "even"
                x, y = start + place * width, top + line * height
                parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width - 3}" height="{height - 3}" rx="4"/>')
                parts.append(
                    f'<text class="label" x="{x + 10}" y="{y + 21}">{row[f"{ladder}: difference"]:+.3f}</text>'
                )
    for line, text in enumerate(texts):
        parts.append(f'<text class="label" x="4" y="{top + line * height + 21}">{escape(text)}</text>')
    total = (left + len(ladders) * len(budgets) * width, top + len(texts) * height + 8)
    drawn = f'<svg viewBox="0 0 {total[0]} {total[1]}" role="img" aria-label="LaCache minus sliding window, nats">'
    return standalone(drawn + "".join(parts) + "</svg>", [])


def standalone(svg: str, keys: Sequence[tuple[str, str]]) -> str:
    """An SVG that needs no page around it: with its colours, a ground and a legend above."""
    opening, _, body = svg.partition(">")
    _, _, rest = opening.partition('viewBox="')
    _, _, wide, high = map(float, rest.partition('"')[0].split())
    above, x, legend = 30 if keys else 0, 8.0, []
    for label, colour in keys:
        legend.append(f'<rect class="key {colour}" x="{x:g}" y="{-above + 10}" width="18" height="4" rx="2"/>')
        legend.append(f'<text class="label" x="{x + 24:g}" y="{-above + 17}">{escape(label)}</text>')
        x += 50 + 7 * len(label)
    size = f'viewBox="-8 {-above - 6} {wide + 16:g} {high + above + 12:g}"'
    name = opening.partition('aria-label="')[2].partition('"')[0]
    ground = f'<rect class="paper" x="-8" y="{-above - 6}" width="{wide + 16:g}" height="{high + above + 12:g}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{name}"><style>{STYLE}</style>'
    return f"{head}{ground}{''.join(legend)}{body}\n"


if __name__ == "__main__":
    main()
