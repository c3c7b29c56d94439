from __future__ import annotations

import subprocess
import sys

import pytest

import gratis
from gratis.contract.catalogue import Catalogue
from gratis.contract.errors import UnknownNameError
from gratis.trials.measuring import COSTS

ENTRIES = list(gratis.catalogue.entries.values())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_the_card_read_from_the_source_is_the_class_card(entry):
    method = entry.load()
    assert method.card == entry.card
    assert method.method_name() == entry.name
    assert method.family() == entry.family
    assert method.kind == entry.kind
    assert getattr(gratis, entry.class_name) is method
    assert method.__doc__
    assert entry.card.summary
    for parameter in method.declared().values():
        assert parameter.help, f"{entry.name}.{parameter.name} says nothing about itself"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_claims_name_real_tasks_metrics_and_parameters(entry):
    known = gratis.task_catalogue
    for claim in entry.card.claims:
        task = known[claim.task]
        task(**claim.task_parameters)
        entry.load()(**claim.parameters)
        assert claim.metric in {m.name for m in (*task.card.metrics, *COSTS)}, claim.name
        if claim.against:
            gratis.catalogue[claim.against](**claim.against_parameters)


def test_names_are_forgiving():
    entry = ENTRIES[0]
    for name in (entry.name, entry.name.replace("-", "_"), entry.class_name, entry.name.upper()):
        assert gratis.catalogue[name] is entry.load()
    assert "no-such-method" not in gratis.catalogue
    with pytest.raises(UnknownNameError, match="There is no method 'lacash'; did you mean 'lacache'"):
        gratis.catalogue["lacash"]
    with pytest.raises(KeyError):
        gratis.catalogue["zzz"]
    with pytest.raises(AttributeError):
        _ = gratis.NoSuchMethod


def test_select():
    assert {e.name for e in gratis.catalogue.select(family="memory")} >= {"lacache"}
    assert [e.name for e in gratis.catalogue.select(seed=24)] == ["lacache"]
    assert gratis.catalogue.select(acts_on="chat")
    assert gratis.catalogue.select(free_of="training")


def test_a_card_that_is_no_literal_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("class A(Method):\n    card = Card(title=open('x').read())\n")
    with pytest.raises(ValueError, match="literal"):
        _ = Catalogue("x", tmp_path, "method", {"Card": dict}).entries


def test_importing_and_listing_load_no_torch_and_open_no_socket():
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket = refuse\n"
        "import gratis\nassert len(gratis.catalogue) > 5\nlist(gratis.task_catalogue.entries)\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'sklearn', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
