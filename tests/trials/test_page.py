from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from gratis.trials import plots, words
from gratis.trials.measuring import try_method
from gratis.trials.page import render, save_page
from gratis.trials.trial import Comparison, MetricInfo, SeriesRecord
from tests.trials import fakes
from tests.trials.fakes import Count, Lower, Number, Raise

EMPTY = {"meta", "br", "link", "img", "hr"}


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    fakes.install(monkeypatch)


@pytest.fixture
def page():
    trial = try_method(
        Raise(by=0.5), Number(), Count(size=120), against=[Lower(by=0.2)], rounds=2, command="gratis try <raise>"
    )
    return render(trial)


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in {"src", "href"}]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_nothing_of_the_network(page):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.addresses == []
    assert "<script" not in page
    assert "http" not in page
    assert "url(" not in page
    assert 'name="viewport"' in page


def test_the_page_says_what_happened(page):
    assert "Raise beside as it is: score 0.500 points better" in page
    assert "Beside Lower: score 0.700 points better" in page
    assert "95 % interval" in page
    assert "gratis try &lt;raise&gt;" in page
    assert "“Raising”, 2020" in page
    assert "raised by" in page
    assert "Moving average over" in page


def test_every_plot_is_well_formed_and_drawn_for_both_widths(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) >= 4
    assert len([d for d in drawings if 'class="wide"' in d]) == len([d for d in drawings if 'class="narrow"' in d])
    for drawing in drawings:
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing).groups())
        for element in ElementTree.fromstring(drawing).iter():
            for point in element.get("points", "").split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= width
                assert 0 <= y <= height


def test_a_page_without_gain_or_series(tmp_path):
    class Plain(Count):
        def measure(self, subject, *, seed, progress=None):
            measurement = super().measure(subject, seed=seed)
            measurement.series = {}
            measurement.items = {}
            return measurement

    path = save_page(try_method(Lower(by=0.5), Number(), Plain(), rounds=1), tmp_path / "page.html")
    text = path.read_text()
    assert "points worse; no gain here" in text
    assert "Along the way" not in text
    assert "with 95 % intervals" not in text


def test_not_a_number_is_shown_as_such():
    text = render(try_method(Raise(), Number(float("nan")), Count(), rounds=1))
    assert "not a number" in text
    assert "nan," not in text


@pytest.mark.parametrize(
    ("values", "unit", "ticks", "label"),
    [
        ((0.0, 10.0), "points", (0, 2, 4, 6, 8, 10), "y (points)"),
        ((3e6, 90e6), "bytes", (0, 2e7, 4e7, 6e7, 8e7, 1e8), "y (MB)"),
        ((0.002, 0.004), "s", (0.002, 0.0025, 0.003, 0.0035, 0.004), "y (ms)"),
        ((2.0, 3.1), "nats", (2.0, 2.25, 2.5, 2.75, 3.0, 3.25), "y (nats)"),
        ((5.0, 5.0), "", None, "y"),
    ],
)
def test_axes_have_round_ticks_in_readable_units(values, unit, ticks, label):
    axis = plots.axis(values, f"y ({unit})" if unit else "y", 5)
    assert axis.label == label
    assert axis.low <= min(values)
    assert axis.high >= max(values)
    if ticks is not None:
        assert axis.ticks == pytest.approx(ticks)


def test_places_on_an_axis():
    axis = plots.axis([0.0, 10.0], "x", 5)
    assert axis.place(5.0, 100, 200) == 200
    assert axis.place(10.0, 300, -200) == 100


def test_few_points_are_dots_and_many_are_smoothed():
    def series(n):
        return SeriesRecord(x=tuple(range(n)), y=tuple(float(i % 2) for i in range(n)), x_label="x", y_label="y")

    few = plots.line_plot([plots.Line("a", "c0", series(5))], plots.WIDE)
    many = plots.line_plot([plots.Line("a", "c0", series(200))], plots.WIDE)
    assert few.count("<circle") == 5
    assert "<circle" not in many
    assert plots.smoothing(series(200)) == 9


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "", "0.00"), (2.3749, "nats", "2.37 nats"), (0.0191, "nats", "0.019 nats"), (12000.0, "", "12,000"),
        (70_800_000, "bytes", "70.8 MB"), (0.00265, "s", "2.65 ms"), (97.2, "s", "97.2 s"), (1200.0, "s", "1,200 s"),
        (float("nan"), "", "not a number"), (float("-inf"), "", "-∞"), (None, "", "–"), (1e-5, "", "1.00e-05"),
    ],
)  # fmt: skip
def test_figures_as_a_reader_wants_them(value, unit, text):
    assert words.number(value, unit) == text


def test_cost_sentences():
    def cost(value, baseline, verdict):
        return words.sentence(
            Comparison(
                metric="seconds", arm="A", against="B", value=value, baseline=baseline, difference=value - baseline,
                ratio=value / baseline if baseline else None, verdict=verdict,
            ),
            MetricInfo(name="seconds", help="wall time", unit="s", higher_is_better=False, cost=True),
        )  # fmt: skip

    assert cost(2.0, 4.0, "better") == "Wall time: 2.00 s against 4.00 s, 2.00 times less."
    assert cost(4.0, 2.0, "worse") == "Wall time: 4.00 s against 2.00 s, 2.00 times as much."
    assert cost(4.0, 4.1, "unclear") == "Wall time: 4.00 s against 4.10 s, no clear difference."
    assert cost(4.0, 0.0, "worse") == "Wall time: 4.00 s against 0.00 s, +4.00."
