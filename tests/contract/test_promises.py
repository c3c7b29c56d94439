"""The promises of the design, over every method of the catalogue and without special cases."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest

import gratis
from gratis.contract.errors import AttachmentError, ParameterError, SubjectError
from gratis.contract.method import Attachable
from tests.contract import subjects

ENTRIES = list(gratis.catalogue.entries.values())
LIVE = [e for e in ENTRIES if e.kind in {"attach", "decode", "program"}]
LIMITED = [e for e in LIVE if e.card.unchanged_when is not None]


def _id(entry):
    return entry.name


@cache
def kind_of(acts_on):
    return subjects.LIVE[acts_on]()


@cache
def untouched(acts_on):
    kind = kind_of(acts_on)
    return kind.run(kind.build())


def used(kind, **options):
    """A subject that has run once: running alone may leave things behind that no method put there."""
    subject = kind.build(**options)
    kind.run(subject)
    return subject


def example(entry):
    return entry.load()(**entry.card.examples)


# 1. Exact return


@pytest.mark.parametrize("entry", LIVE, ids=_id)
def test_exact_return(entry):
    kind = kind_of(entry.card.acts_on)
    subject = used(kind)
    before = kind.snapshot(subject)
    with gratis.attach(subject, example(entry)) as handle:
        kind.run(subject)
        handle.report()
    assert kind.snapshot(subject) == before
    np.testing.assert_array_equal(kind.run(subject), untouched(entry.card.acts_on))


@pytest.mark.parametrize("entry", LIVE, ids=_id)
def test_exact_return_after_an_exception(entry):
    kind = kind_of(entry.card.acts_on)
    subject = used(kind)
    before = kind.snapshot(subject)
    with pytest.raises(KeyboardInterrupt), gratis.attach(subject, example(entry)):
        kind.run(subject)
        raise KeyboardInterrupt
    assert kind.snapshot(subject) == before
    np.testing.assert_array_equal(kind.run(subject), untouched(entry.card.acts_on))


@pytest.mark.parametrize("entry", LIVE, ids=_id)
def test_attached_twice_is_refused_and_can_be_attached_again(entry):
    kind = kind_of(entry.card.acts_on)
    subject = kind.build()
    with gratis.attach(subject, example(entry)):
        inside = kind.snapshot(subject)
        with pytest.raises(AttachmentError, match=entry.name):
            gratis.attach(subject, example(entry))
        assert kind.snapshot(subject) == inside
    gratis.attach(subject, example(entry)).detach()


# 2. Identity at the limit


@pytest.mark.parametrize("entry", LIMITED, ids=_id)
def test_identity_at_the_limit(entry):
    kind = kind_of(entry.card.acts_on)
    subject = kind.build()
    method = entry.load()(**{**entry.card.examples, **entry.card.unchanged_when})
    with gratis.attach(subject, method):
        np.testing.assert_array_equal(kind.run(subject), untouched(entry.card.acts_on))


@pytest.mark.parametrize("entry", LIMITED, ids=_id)
def test_it_acts_away_from_the_limit(entry):
    kind = kind_of(entry.card.acts_on)
    subject = kind.build()
    with gratis.attach(subject, example(entry)) as handle:
        changed = not np.array_equal(kind.run(subject), untouched(entry.card.acts_on))
        assert changed or handle.report(), "the card's examples must make the method act on the tiny subject"


# 3. Refusals


def bad_values(parameter):
    yield object()
    if parameter.inner_type in (int, float):
        yield from ("12", True, math.nan)
        if parameter.above is not None:
            yield parameter.above
        if parameter.at_least is not None:
            yield parameter.at_least - 1
        if parameter.below is not None:
            yield parameter.below
        if parameter.at_most is not None:
            yield parameter.at_most + 1
    if parameter.allowed:
        yield "no such choice"
    if not parameter.optional:
        yield None


@pytest.mark.parametrize("entry", ENTRIES, ids=_id)
def test_bad_parameters_are_refused_when_constructed(entry):
    method = entry.load()
    with pytest.raises(ParameterError, match="no parameter 'no_such_parameter'"):
        method(no_such_parameter=1)
    for parameter in method.declared().values():
        if parameter.inner_type in (Any, object) or not isinstance(parameter.inner_type, type):
            continue
        for value in bad_values(parameter):
            with pytest.raises(ParameterError) as caught:
                method(**{**entry.card.examples, parameter.name: value})
            message = str(caught.value)
            assert parameter.name in message
            assert "\n" not in message
            assert message.endswith(".")


class Stranger:
    """What no method acts on."""


@pytest.mark.parametrize("entry", LIVE, ids=_id)
def test_bad_subjects_are_refused_before_anything_changed(entry):
    import torch

    method = example(entry)
    assert isinstance(method, Attachable)
    strangers = [Stranger(), torch.nn.Linear(2, 2)]
    strangers += [kind_of(other).build() for other in subjects.LIVE if other != entry.card.acts_on]
    for stranger in strangers:
        before = sorted(vars(stranger))
        with pytest.raises(SubjectError) as caught:
            gratis.attach(stranger, method)
        assert "\n" not in str(caught.value)
        assert sorted(vars(stranger)) == before


# 4. Determinism, batch rows, dtypes


@pytest.mark.parametrize("entry", LIVE, ids=_id)
def test_same_seed_same_result(entry):
    kind = kind_of(entry.card.acts_on)
    results = []
    for _ in range(2):
        subject = kind.build()
        with gratis.attach(subject, example(entry)):
            results.append(kind.run(subject))
            results.append(kind.run(subject))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("entry", LIVE, ids=_id)
def test_a_row_alone_equals_that_row_in_a_batch(entry):
    kind = kind_of(entry.card.acts_on)
    if kind.rows is None:
        pytest.skip("this kind of subject has no batch")
    subject = kind.build()
    with gratis.attach(subject, example(entry)):
        alone, together = kind.rows(subject, 1), kind.rows(subject, 2)
    np.testing.assert_allclose(alone[0], together[0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("entry", LIVE, ids=_id)
def test_every_dtype_that_the_subject_supports(entry):
    kind = kind_of(entry.card.acts_on)
    for dtype in kind.dtypes:
        subject = used(kind, dtype=dtype)
        before = kind.snapshot(subject)
        with gratis.attach(subject, example(entry)):
            assert np.isfinite(kind.run(subject).astype(np.float64)).all()
        assert kind.snapshot(subject) == before


# 5. Files


@pytest.mark.parametrize("entry", ENTRIES, ids=_id)
def test_recipe_round_trip(entry, tmp_path):
    method = entry.load()(**entry.card.examples)
    recipe = gratis.Recipe(subject="smollm2", methods=[method])
    path = tmp_path / "recipe.yaml"
    recipe.save(path)
    again = gratis.Recipe.load(path)
    assert again == recipe
    assert again.methods == [method] or again.methods == (method,)


@pytest.mark.parametrize("entry", ENTRIES, ids=_id)
def test_constructor_arguments_rebuild_the_method(entry):
    method = entry.load()(**entry.card.examples)
    assert type(method)(**method.parameters()) == method
    assert method.replace() == method


# Several subjects, several threads


@pytest.mark.parametrize("entry", LIVE, ids=_id)
def test_two_subjects_with_the_same_method_do_not_mix(entry):
    kind = kind_of(entry.card.acts_on)
    alone = kind.build()
    with gratis.attach(alone, example(entry)):
        expected = kind.run(alone)
    one, two = kind.build(), kind.build()
    first = gratis.attach(one, example(entry))
    second = gratis.attach(two, example(entry))
    np.testing.assert_array_equal(kind.run(one), expected)
    np.testing.assert_array_equal(kind.run(two), expected)
    first.detach()
    np.testing.assert_array_equal(kind.run(two), expected)
    np.testing.assert_array_equal(kind.run(one), untouched(entry.card.acts_on))
    second.detach()


@pytest.mark.parametrize("entry", LIVE, ids=_id)
def test_two_threads_on_two_subjects(entry):
    kind = kind_of(entry.card.acts_on)
    alone = kind.build()
    with gratis.attach(alone, example(entry)):
        expected = kind.run(alone)
        draws = not np.array_equal(expected, kind.run(alone, seed=1))
    built = [kind.build(), kind.build()]

    def work(subject):
        with gratis.attach(subject, example(entry)):
            return kind.run(subject)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, built))
    if not draws:  # threads share torch's generator, so what draws from it is compared by its traces only
        for result in results:
            np.testing.assert_array_equal(result, expected)
    for subject in built:
        np.testing.assert_array_equal(kind.run(subject), untouched(entry.card.acts_on))


# Estimators


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.kind == "estimator"], ids=_id)
def test_estimators_keep_the_promises(entry):
    from sklearn.base import clone

    from tests import tiny_vision as tiny

    data = tiny.tiny_features()
    copies = [part.copy() for part in data]
    method = example(entry)
    first = tiny.run(method, data)
    np.testing.assert_array_equal(tiny.run(clone(method), data), first)
    for part, copy in zip(data, copies, strict=True):
        np.testing.assert_array_equal(part, copy)
    limit = entry.load()(**{**entry.card.examples, **entry.card.unchanged_when})
    np.testing.assert_array_equal(tiny.run(limit, data), tiny.identity(data))
    assert not np.array_equal(first, tiny.identity(data))
