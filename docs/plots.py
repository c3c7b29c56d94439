"""Draw the plots of the guide "Read more than your memory holds" from the stored results of the benchmarks.

    python docs/plots.py

Reads benchmarks/results/{long_context,long_context_gpu,retrieval,lacache_map}.json and writes docs/guides/memory-*.svg.
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
    long, gpu, recalled, ladder = (
        _stored(name) for name in ("long_context", "long_context_gpu", "retrieval", "lacache_map")
    )
    made = {}
    if found := {title: rows for title, rows in recalled.items() if " tokens of " in title}:
        made["recall"] = recall(found)
    if times := _table(long, "time per decoded token"):
        made["time"] = lines(times, "history", "tokens read before", "time per token (ms)")
    if prose := _table(ladder, "loss in nats"):
        made["map"] = heat_map(prose)
    if facts := _table(ladder, "recall of"):
        made["facts"] = fact_map(facts, int(next(key for key in ladder if key.startswith("recall of")).split()[2]))
    streams = {
        "loss": ("loss of each stretch in nats, documentation", "loss (nats)"),
        "loss-code": ("loss of each stretch in nats, source code", "loss (nats)"),
        "process": ("memory of the process", "memory of the process (MB)"),
        "near": ("keys and values on the model's device", "keys and values on the device (MB)"),
    }
    for name, (title, unit) in streams.items():
        if rows := _table(long, title):
            made[name] = lines(rows, "read", "tokens read", unit, marks=[(WINDOW, "trained window")])
    columns = {
        "gpu-speed": ("tokens written per second", "tokens written per second"),
        "gpu-reading": ("tokens read per second", "tokens read per second"),
        "gpu-memory": ("peak memory writing, MB", "peak memory above the weights, writing (MB)"),
    }
    for name, (column, label) in columns.items():
        if table := by_history(_table(gpu, "writing after"), column):
            made[name] = lines(table, "history", "tokens read before", label)
    return made


def by_history(rows: Sequence[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """A row per history with a column per arm, of what ran; of several forms of one arm, the first."""
    table: dict[int, dict[str, Any]] = {}
    for row in rows:
        if column in row:
            of_history = table.setdefault(row["history"], {"history": row["history"]})
            of_history.setdefault(row["arm"].partition(",")[0], row[column])
    return [table[history] for history in sorted(table)]


def _stored(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _table(results: dict[str, Any], title: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = next((value for key, value in results.items() if key.startswith(title)), [])
    return rows


def lines(
    rows: Sequence[dict[str, Any]], x: str, x_label: str, y_label: str, marks: Sequence[tuple[float, str]] = ()
) -> str:
    """A line per column of a table."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != x))
    drawn = []
    for name in names:
        known = [(row[x], row[name]) for row in rows if name in row]
        series = SeriesRecord(
            x=[a for a, _ in known], y=[b for _, b in known], x_label=x_label, y_label=y_label, marks=list(marks)
        )
        label = name.removesuffix(", ms")
        drawn.append(Line(label, COLOURS[label.partition(",")[0]], series))
    return standalone(line_plot(drawn, WIDE), [(line.label, line.colour) for line in drawn], y_label)


def recall(tables: dict[str, Any]) -> str:
    """How many hidden numbers each arm found, by length of the text and depth; green where it found all, red none."""
    order = sorted(tables, key=lambda title: (title.split()[-1] != "filler", int(title.split()[0])))
    arms = list(dict.fromkeys(row["arm"] for rows in tables.values() for row in rows))
    depths = [key for key in next(iter(tables.values()))[0] if key.startswith("depth")]
    left, top, cell, height, gap = 150, 52, 38, 26, 16
    panel, last, parts = cell * len(depths) + gap, "filler", []
    for place, arm in enumerate(arms):
        start = left + place * panel
        parts.append(f'<text class="label" x="{start}" y="18">{escape(arm)}</text>')
        parts += [
            f'<text x="{start + column * cell + 3}" y="42">{float(depth.split()[1]):.0%}</text>'
            for column, depth in enumerate(depths)
        ]
    y = top
    for title in order:
        length, prose = int(title.split()[0]), title.split()[-1]
        y += 0 if prose == last else gap // 2
        last = prose
        parts.append(f'<text class="label" x="4" y="{y + 18}">{length:,} {escape(prose)}</text>')
        rows = {row["arm"]: row for row in tables[title]}
        for place, arm in enumerate(arms):
            if arm not in rows:
                continue
            each = rows[arm]["of"] // len(depths)
            for column, depth in enumerate(depths):
                found, x = rows[arm][depth], left + place * panel + column * cell
                kind = "better" if found == each else "worse" if not found else "even"
                parts.append(_cell(kind, x, y, cell, height, f"{found}/{each}", 5))
        y += height
    parts.append(f'<text x="{left}" y="{y + 18}">columns: depth of the number in the text; rows: tokens</text>')
    return _drawn(left + len(arms) * panel, y + 28, "numbers found by method, length and depth", parts)


def heat_map(rows: Sequence[dict[str, Any]]) -> str:
    """LaCache minus sliding window by ladder, text and budget; coloured where the interval excludes zero."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    budgets = sorted({row["budget"] for row in rows})
    ladders = [key.removesuffix(": difference") for key in rows[0] if key.endswith(": difference")]
    left, top, width, height = 140, 30, 190, 30
    parts = [
        f'<text x="{left + place * width + 6}" y="18">budget {budget}</text>' for place, budget in enumerate(budgets)
    ]
    y = top
    for ladder in ladders:
        parts.append(f'<text class="label" x="4" y="{y + 20}">{escape(ladder)}</text>')
        y += height
        for text in texts:
            parts.append(f'<text x="14" y="{y + 20}">{escape(text)}</text>')
            for place, budget in enumerate(budgets):
                row = next((r for r in rows if r["text"] == text and r["budget"] == budget), None)
                if row is None:
                    continue
                low, high = row[f"{ladder}: interval"]
                kind = "better" if high < 0 else "worse" if low > 0 else "even"
                said = f"{row[f'{ladder}: difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
                parts.append(_cell(kind, left + place * width, y, width, height, said, 8))
            y += height
    return _drawn(left + len(budgets) * width, y + 8, "LaCache minus sliding window, nats", parts)


def fact_map(rows: Sequence[dict[str, Any]], trials: int) -> str:
    """How many numbers were written right, by arm, how often they were stated and how long ago."""
    arms = [key.removesuffix(": right") for key in rows[0] if key.endswith(": right")]
    left, top, width, height = 290, 44, 134, 30
    parts, y = [], top
    for place, row in enumerate(rows):
        times = "once" if row["stated"] == 1 else f"{row['stated']} times"
        parts.append(f'<text x="{left + place * width + 4}" y="16">stated {times}</text>')
        parts.append(f'<text x="{left + place * width + 4}" y="34">{row["tokens since"]:,} tokens ago</text>')
    for arm in arms:
        parts.append(f'<text class="label" x="4" y="{y + 20}">{escape(arm)}</text>')
        for place, row in enumerate(rows):
            found = row[f"{arm}: right"]
            kind = "better" if found == trials else "worse" if not found else "even"
            said = f"{found} of {trials}"
            parts.append(_cell(kind, left + place * width, y, width, height, said, 8))
        y += height
    return _drawn(left + len(rows) * width, y + 8, "numbers written right", parts)


def _cell(kind: str, x: int, y: int, width: int, height: int, said: str, inside: int) -> str:
    box = f'<rect class="{kind}" x="{x}" y="{y}" width="{width - 2}" height="{height - 2}" rx="3"/>'
    return f'{box}<text class="label" x="{x + inside}" y="{y + height // 2 + 4}">{escape(said)}</text>'


def _drawn(width: int, height: int, said: str, parts: Sequence[str]) -> str:
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}">'
    return standalone(opening + "".join(parts) + "</svg>", [])


def standalone(svg: str, keys: Sequence[tuple[str, str]], heading: str = "") -> str:
    """An SVG that needs no page around it: with its colours, a ground, and a heading and a legend above."""
    opening, _, body = svg.partition(">")
    _, _, rest = opening.partition('viewBox="')
    _, _, wide, high = map(float, rest.partition('"')[0].split())
    above, x, legend = 54 if keys else 0, 8.0, []
    if heading:
        legend.append(f'<text class="label" x="8" y="{-above + 40}">{escape(heading)}</text>')
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
