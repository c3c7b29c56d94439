from __future__ import annotations

import json

import pytest

from gratis.contract.attach import attach, attached
from gratis.contract.errors import FileError, ParameterError, SubjectError, UnknownNameError
from gratis.trials import measuring, words
from gratis.trials.measuring import try_method
from gratis.trials.trial import Trial
from tests.trials import fakes
from tests.trials.fakes import LOG, Break, Count, Lower, Number, Raise, WarmCount


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    fakes.install(monkeypatch)


def test_before_and_after_are_measured_on_the_same_work():
    trial = try_method(Raise(by=2.0), Number(1.0), Count(), rounds=2, seed=5)
    before, after = trial.arms
    assert (before.label, after.label) == ("as it is", "Raise")
    assert before.metrics["score"].median == pytest.approx(sum(1 + 0.1 * ((i + 5) % 3 - 1) for i in range(8)) / 8)
    assert after.metrics["score"].median == pytest.approx(3 * before.metrics["score"].median)
    comparison = trial.compare("Raise", "as it is")["score"]
    assert comparison.ratio == pytest.approx(3)
    assert comparison.low < comparison.difference < comparison.high
    assert comparison.verdict == "better"
    assert trial.compare("Raise", "as it is")["noise"].verdict == "same"
    assert trial.compare("Raise", "as it is")["effort"].verdict == "same"
    assert after.reports == {"fakes": {"raised_by": 2.0}}
    assert (after.tokens, after.calls, after.details["largest"]) == (8, 1, pytest.approx(3.3))
    assert {"seconds", "cpu_seconds", "peak_memory", "tokens", "calls"} <= set(after.metrics)


def test_arms_take_turns_in_rotating_order_after_a_warm_up():
    subject = Number(10.0)
    trial = try_method(Raise(by=1.0), subject, Count(), against=[Lower(by=1.0)], rounds=3)
    assert [value for _, value, _ in LOG] == [10, 10, 9, 11, 9, 11, 10, 11, 10, 9]
    assert trial.warm_up == "as it is once in full"
    assert [arm.label for arm in trial.arms] == ["as it is", "Lower", "Raise"]
    assert subject.value == 10
    assert not attached(subject)


def test_a_short_form_warms_every_arm():
    trial = try_method(Raise(), Number(), WarmCount(size=5), rounds=1)
    assert [(size, value) for size, value, _ in LOG] == [("2", 1), ("2", 2), ("5", 1), ("5", 2)]
    assert trial.warm_up == "each arm once with size=2"
    assert trial.rounds == 1


def test_without_a_wish_rounds_end_when_they_take_long(monkeypatch):
    assert try_method(Raise(), Number(), Count()).rounds == 3
    monkeypatch.setattr(measuring, "ENOUGH_SECONDS", -1.0)
    assert try_method(Raise(), Number(), Count()).rounds == 1
    assert try_method(Raise(), Number(), Count(), rounds=2).rounds == 2


def test_a_rival_by_name_takes_the_shared_parameters():
    trial = try_method(Raise(by=0.5, shared=7), Number(), Count(), against=["lower"], rounds=1)
    assert trial.arms[1].methods[0].parameters == {"by": 0.5, "shared": 7}


def test_several_methods_go_on_together():
    trial = try_method([Raise(by=2.0), Lower(by=0.5)], Number(1.0), Count(wobble=0.0), rounds=1)
    assert trial.arms[-1].label == "Raise + Lower"
    assert trial.arms[-1].metrics["score"].median == pytest.approx(2.5)


def test_worse_is_said_as_plainly_as_better():
    trial = try_method(Lower(by=0.5), Number(1.0), Count(), rounds=1)
    assert trial.compare("Lower", "as it is")["score"].verdict == "worse"
    [(other, told)] = words.verdicts(trial)
    assert other == "as it is"
    assert told[0][0] == "worse"
    assert "no gain here" in told[0][1]
    assert "score 0.494 points worse" in words.headline(trial, other)


def test_a_difference_within_the_noise_is_unclear():
    class Noisy(Count):
        def measure(self, subject, *, seed, progress=None):
            measurement = super().measure(subject, seed=seed)
            items = [0.0] * 4 + [subject.value, -subject.value + 0.1]
            measurement.items["score"], measurement.metrics["score"] = items, sum(items) / 6
            return measurement

    trial = try_method(Raise(), Number(), Noisy(), rounds=1)
    assert trial.compare("Raise", "as it is")["score"].verdict in {"unclear", "same"}


def test_names_default_tasks_and_refusals():
    assert try_method("raise", task="count", rounds=1).task.name == "fakes"
    with pytest.raises(UnknownNameError, match="did you mean 'raise'"):
        try_method("rais")
    with pytest.raises(UnknownNameError, match="did you mean 'count'"):
        try_method("raise", task="coumt")
    with pytest.raises(ParameterError, match="opened by name"):
        try_method(Raise(), Number(), Count(), device="cpu")
    with pytest.raises(ParameterError, match="at least one round"):
        try_method(Raise(), Number(), Count(), rounds=0)
    with pytest.raises(ParameterError, match="--task"):
        try_method(Lower(), Number())
    with pytest.raises(ParameterError, match="same method with the same parameters"):
        try_method(Raise(), Number(), Count(), against=[Raise()])
    LOG.clear()
    with pytest.raises(SubjectError, match="count needs a Number"):
        try_method(Raise(), object(), Count())
    assert not LOG


def test_the_method_refuses_before_anything_is_measured():
    class Picky(Raise):
        def check(self, subject):
            raise SubjectError("not this one")

    with pytest.raises(SubjectError, match="not this one"):
        try_method(Picky(), Number(), Count())
    assert not LOG


def test_what_a_subject_is_called(tmp_path):
    assert measuring.describe(Number(), "owner/name")["name"] == "owner/name"
    assert measuring.describe(Number(), str(tmp_path))["name"] == tmp_path.name
    assert measuring.describe(Number(), "https://me:secret@host:8000/v1?key=x")["name"] == "https://host:8000"
    assert measuring.describe(Number())["name"] == "Number"
    assert measuring.describe((1, 2))["name"] == "the task's own"


def test_before_must_be_before():
    subject = Number()
    with attach(subject, Raise()), pytest.raises(SubjectError, match="already attached"):
        try_method(Lower(), subject, Count())


def test_an_exception_in_a_run_takes_the_method_off():
    subject = Number()
    with pytest.raises(TypeError):
        try_method(Break(), subject, Count(), rounds=1)
    assert subject.value == 1.0
    assert not attached(subject)


def test_progress_runs_from_nothing_to_all():
    seen = []
    try_method(Raise(), Number(), Count(), rounds=2, progress=lambda fraction, words: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_a_task_that_forgets_a_metric_is_found_out():
    class Forgetful(Count):
        def measure(self, subject, *, seed, progress=None):
            measurement = super().measure(subject, seed=seed)
            del measurement.metrics["noise"]
            return measurement

    with pytest.raises(Exception, match="did not measure noise"):
        try_method(Raise(), Number(), Forgetful(), rounds=1)


def test_a_trial_survives_its_file(tmp_path):
    trial = try_method(Raise(by=float("1e9")), Number(), Count(), rounds=1, command="gratis try raise")
    path = trial.save(tmp_path / "deep" / "trial.json")
    assert Trial.load(path) == trial
    assert json.loads(path.read_text())["version"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["trial.json"]


def test_not_a_number_survives_its_file(tmp_path):
    trial = try_method(Raise(), Number(float("nan")), Count(), rounds=1)
    loaded = Trial.load(trial.save(tmp_path / "t.json"))
    assert loaded.arms[0].metrics["score"].median != loaded.arms[0].metrics["score"].median
    assert loaded.compare("Raise", "as it is")["score"].verdict == "unclear"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a trial file"),
        ("{", "is not a trial file"),
        ("{}", "is not a trial file"),
        (b"\xff\xfe\x00", "cannot be read: it is not text"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, text, said):
    path = tmp_path / "t.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileError, match=said):
        Trial.load(path)


def test_other_versions_and_missing_files_are_refused(tmp_path):
    trial = try_method(Raise(), Number(), Count(), rounds=1)
    path = trial.save(tmp_path / "t.json")
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(FileError, match="has version 2"):
        Trial.load(path)
    with pytest.raises(FileError, match="no such file"):
        Trial.load(tmp_path / "none.json")
