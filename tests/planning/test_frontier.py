from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from gratis.contract.errors import FileError, ParameterError
from gratis.planning import Attention, Hardware, Shape, Trace, plan, read_traces
from gratis.planning.hardware import PRESETS, measure
from gratis.planning.page import save_page
from gratis.planning.traces import write_traces

SHAPES = {"small": Shape("small", 1e8, 4, 32, 32, 128), "large": Shape("large", 1e10, 32, 32, 2, 128)}


def traces():
    made = []
    for model, right in (("small", 1), ("large", 6)):
        for question in range(6):
            scores = (1,) * (right + question % 2) + (0,) * (8 - right - question % 2)
            made.append(
                Trace(
                    model=model, question=f"q{question}", prompt=40, lengths=(4000, 8000) * 4, scores=scores,
                    scores_at={2000: (0,) * 8},
                )
            )  # fmt: skip
    return made


def test_the_preferred_model_changes_with_the_hardware():
    """Where reading memory is dear, a large model with few key heads is preferred to many samples of a small one."""
    cheap, dear = (plan(traces(), SHAPES, Hardware("x", intensity, 1.0)) for intensity in (1e-3, 1e6))
    for made in (cheap, dear):
        assert [c.option.accuracy for c in made.choices] == sorted(c.option.accuracy for c in made.choices)
    models = [[choice.option.model for choice in made.choices] for made in (cheap, dear)]
    assert models[0] != models[1]


def test_the_best_option_is_found_by_trying_all():
    made = plan(traces(), SHAPES, PRESETS["h100"], sparse=[Attention.of_study(512)])
    intensity = made.hardware.intensity
    for budget in np.geomspace(made.choices[0].budget, made.choices[-1].budget, 13):
        within = [option for option in made.options if option.cost.total(intensity) <= budget]
        assert made.best(budget).accuracy == max(option.accuracy for option in within)


def test_a_setting_per_question_is_the_best_that_each_question_can_afford():
    made = plan(traces(), SHAPES, PRESETS["h100"])
    own = [option for option in made.options if option.model == "small"]
    by_hand = [
        np.mean([max([o.scores[q] for o in own if o.costs[q].total(made.hardware.intensity) <= budget], default=0.0) for q in range(6)])
        for budget in made.budgets
    ]  # fmt: skip
    around = [np.mean([by_hand[min(max(i + d, 0), len(by_hand) - 1)] for d in (-1, 0, 1)]) for i in range(len(by_hand))]
    np.testing.assert_allclose(made.per_question["small"], around)


def test_options_are_samples_of_whole_generations_and_single_ones_cut_off():
    made = plan(traces(), {"small": SHAPES["small"]}, PRESETS["h100"])
    assert {(o.trials, o.limit) for o in made.options} == {(1, None), (2, None), (4, None), (8, None), (1, 2000)}
    assert made.skipped == ("large",)
    cut, whole = (next(o for o in made.options if o.trials == 1 and o.limit == limit) for limit in (2000, None))
    assert cut.cost.traffic < whole.cost.traffic
    assert cut.accuracy == 0.0


def test_sparse_options_from_dense_traces_are_marked():
    made = plan(traces(), SHAPES, PRESETS["h100"], sparse=[Attention.of_study(512)])
    sparse = [option for option in made.options if option.attention.budget is not None]
    assert sparse
    assert all(option.assumed for option in sparse)
    assert sparse[0].generation()["attach"] == {"block-top-k": {"blocks": 16, "block": 32, "window": 0}}


def test_what_is_too_dear_is_said():
    made = plan(traces(), SHAPES, PRESETS["h100"])
    with pytest.raises(ParameterError, match="cheapest option takes"):
        made.best(1.0)


def test_models_with_other_questions_are_refused():
    with pytest.raises(ParameterError, match="same questions"):
        plan(traces()[:-1], SHAPES, PRESETS["h100"])
    with pytest.raises(ParameterError, match="No trace is of a given model"):
        plan(traces(), {"other": SHAPES["small"]}, PRESETS["h100"])
    with pytest.raises(ParameterError, match="between 1 and 8"):
        plan(traces(), SHAPES, PRESETS["h100"], trials=[9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": (0, 100)}, "0 or 1"), ({"lengths": (3, 0)}, "numbers of tokens"), ({"scores": (1,)}, "2 lengths and 1"),
        ({"extra": 1}, "extra"), ({"scores_at": {8: (1,)}}, "2 lengths and 1"),
    ],
)  # fmt: skip
def test_traces_that_are_none_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        Trace(**{"model": "m", "question": "q", "prompt": 3, "lengths": (3, 4), "scores": (0, 1), **change})


def test_traces_are_read_back(tmp_path):
    write_traces(traces(), tmp_path / "traces.jsonl")
    assert read_traces(tmp_path / "traces.jsonl") == traces()


def test_a_line_that_is_no_trace_is_named(tmp_path):
    path = tmp_path / "traces.jsonl"
    write_traces(traces()[:1], path)
    path.write_text(path.read_text() + json.dumps({"model": "m"}) + "\n")
    with pytest.raises(FileError, match="Line 2 of"):
        read_traces(path)
    path.write_text("")
    with pytest.raises(FileError, match="no traces"):
        read_traces(path)


def test_hardware_by_name_and_by_numbers():
    assert Hardware.named("B200").intensity == 562.5
    assert Hardware.named("989:3.35").intensity == pytest.approx(295.2, abs=0.1)
    with pytest.raises(ParameterError, match="did you mean 'h100'"):
        Hardware.named("h10")
    with pytest.raises(ParameterError, match="positive"):
        Hardware.named("0:1")


def test_this_machine_can_be_measured(monkeypatch):
    monkeypatch.setattr("gratis.planning.hardware._SIZE", 64)
    monkeypatch.setattr("gratis.planning.hardware._BYTES", 1 << 16)
    found = measure()
    assert found.flops > 0
    assert found.bandwidth > 0


def test_the_page_holds_every_choice(tmp_path):
    made = plan(traces(), SHAPES, PRESETS["h100"], sparse=[Attention.of_study(512)])
    page = save_page(made, tmp_path / "plan.html", "gratis plan").read_text()
    assert page.count("<tr>") == 1 + len(made.choices)
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
