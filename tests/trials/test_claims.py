from __future__ import annotations

import pytest

from gratis.contract.card import Claim
from gratis.contract.errors import FileError, UnknownNameError
from gratis.trials import claims
from tests.trials import fakes
from tests.trials.fakes import LOG


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    fakes.install(monkeypatch)


def test_claims_pass_and_fail_by_their_bounds():
    first, second = claims.verify("raise")
    assert (first.claim, first.passed, first.figure, first.bound) == (
        "raises by one",
        True,
        pytest.approx(0.9875),
        ">= 0.9",
    )
    assert first.low < first.figure < first.high
    assert (first.value, first.baseline, first.against) == (pytest.approx(1.975), pytest.approx(0.9875), "as it is")
    assert (second.passed, second.figure) == (False, pytest.approx(2))


def test_claims_on_the_same_work_share_its_runs():
    claims.verify("raise")
    assert [value for _, value, _ in LOG] == [1.0, 2.0]
    LOG.clear()
    claims.verify("raise")
    assert len(LOG) == 2


def test_costs_are_measured_in_turns_after_a_warm_up(monkeypatch):
    costly = Claim(name="takes no longer", task="count", metric="seconds", compare="ratio", at_most=50)
    entry = fakes.entries(fakes.Raise)["raise"]
    card = type(entry.card)(title="t", year=1, acts_on="torch module", free_of=(), claims=(costly,))
    monkeypatch.setitem(claims.catalogue.entries, "raise", type(entry)(**{**vars(entry), "card": card}))
    [result] = claims.verify("raise")
    assert result.passed
    assert result.rounds == 3
    assert [value for _, value, _ in LOG] == [1, 1, 2, 2, 1, 1, 2]


def test_a_claim_that_cannot_be_measured_fails_with_the_reason():
    broken, unmeasured = claims.verify(["break"])
    assert (broken.passed, broken.figure) == (False, None)
    assert broken.error.startswith("TypeError: ")
    assert unmeasured.error == broken.error
    results = claims.verify()
    assert [r.method for r in results] == ["raise", "raise", "break", "break"]
    assert [r.passed for r in results] == [True, False, False, False]


def test_a_claim_on_an_unknown_task_or_metric_fails_with_the_reason(monkeypatch):
    entry = fakes.entries(fakes.Raise)["raise"]
    promised = (
        Claim(name="a", task="coumt", metric="score", at_least=0),
        Claim(name="b", task="count", metric="nothing", at_least=0),
        Claim(name="c", task="count", metric="score", at_least=0, parameters={"bye": 1}),
        Claim(name="d", task="count", metric="score", at_least=0, task_parameters={"size": 0}),
        Claim(name="e", task="count", metric="score", at_least=0),
    )
    card = type(entry.card)(title="t", year=1, acts_on="torch module", free_of=(), claims=promised)
    monkeypatch.setitem(claims.catalogue.entries, "raise", type(entry)(**{**vars(entry), "card": card}))
    results = {r.claim: r for r in claims.verify("raise")}
    assert "did you mean 'count'" in results["a"].error
    assert results["b"].error == "The task fakes does not measure nothing."
    assert "did you mean 'by'" in results["c"].error
    assert "size" in results["d"].error
    assert results["e"].passed


def test_a_figure_that_is_not_a_number_never_passes(monkeypatch):
    monkeypatch.setattr(fakes.Count, "subject", lambda self: fakes.Number(float("nan")))
    assert not any(result.passed for result in claims.verify("raise"))


def test_unknown_methods_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'raise'"):
        claims.verify(["rais"])


def test_results_are_stored_beside_those_of_other_methods(tmp_path):
    path = tmp_path / "claims.json"
    results = claims.verify("break")
    claims.store(results, path)
    claims.store(claims.verify("raise"), path)
    assert [r.method for r in claims.stored(path)] == ["raise", "raise", "break", "break"]
    assert claims.stored(path)[2:] == tuple(results)
    assert [p.name for p in tmp_path.iterdir()] == ["claims.json"]


def test_a_result_counts_only_for_the_claim_as_it_stands(tmp_path):
    path = claims.store(claims.verify("raise"), tmp_path / "claims.json")
    claim = fakes.Raise.card.claims[0]
    assert claims.last_result("raise", claim, path).passed
    changed = Claim(**{**vars(claim), "at_least": 0.5})
    assert claims.last_result("raise", changed, path) is None
    assert claims.last_result("raise", claim, tmp_path / "none.json") is None


def test_a_damaged_results_file_is_refused(tmp_path):
    path = tmp_path / "claims.json"
    path.write_text("[]")
    with pytest.raises(FileError, match="is not a results file"):
        claims.stored(path)


def test_every_claim_is_told_as_it_is_known():
    told = []
    results = claims.verify("raise", tell=told.append)
    assert told == results
