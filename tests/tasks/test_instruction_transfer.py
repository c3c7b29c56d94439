"""Facts told plainly and asked for in another form: what counts, and the figures of the method's card."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import gratis
from gratis.contract.errors import SubjectError
from gratis.tasks import instruction_transfer as task
from gratis.tasks.instruction_transfer import ASKED, EARLY, InstructionTransfer, answered, recalled

VALUES = task.EARLY + task.LATE + torch.arange(task.EARLY + task.LATE) % task.VALUES


class Scripted:
    """Answers questions about even keys rightly, ends those about keys that 4 divides, recalls keys that 3 divides."""

    device = torch.device("cpu")

    def __call__(self, input_ids):
        ids = input_ids
        chosen = torch.full((len(ids),), task.START)
        if ids.shape[1] == 2:
            key = ids[:, 1]
            chosen = torch.where(key % 3 == 0, VALUES[key], chosen)
        elif ids.shape[1] == 4:
            assert bool((ids[:, 1] == task.QUESTION).all())
            key = ids[:, 2]
            chosen = torch.where(key % 2 == 0, VALUES[key], chosen)
        else:
            chosen = torch.where(ids[:, 2] % 4 == 0, task.END, chosen)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(chosen, task.VOCABULARY)[:, None].float())


def test_an_answer_counts_where_value_and_end_are_right():
    late = range(EARLY, EARLY + 12)
    assert answered(Scripted(), VALUES, late) == [float(key % 4 == 0) for key in late]
    assert recalled(Scripted(), VALUES, late) == [float(key % 3 == 0) for key in late]


def test_late_facts_are_measured_and_early_ones_that_no_question_was_about():
    found = InstructionTransfer().measure((Scripted(), VALUES), seed=0)
    assert len(found.items["answered"]) == task.LATE
    assert len(found.items["early"]) == EARLY - ASKED == 20
    assert found.metrics == {"answered": 0.25, "early": 0.25, "recall": 27 / 80}


def test_only_merges_apply():
    with pytest.raises(SubjectError, match="no merge"):
        InstructionTransfer().applied((), gratis.LaCache())


@pytest.mark.evidence
@pytest.mark.parametrize("models", [0, 1])
def test_the_form_comes_with_the_vector_and_not_with_the_average(models):
    """The card's figures: merged at least 0.3 and five times the instruct model, the average at most 0.05."""
    this = InstructionTransfer(models=models)
    subject = this.subject()
    model, _, _, instruct, values = subject
    model.load_state_dict(instruct)
    alone = this.measure((model, values), seed=0).metrics
    with this.applied(subject, gratis.InstructionVector()) as merged:
        added = this.measure(merged, seed=0).metrics
    with this.applied(subject, gratis.Average()) as merged:
        mean = this.measure(merged, seed=0).metrics
    with this.applied(subject, None) as plain:
        domain = this.measure(plain, seed=0).metrics
    assert domain["answered"] == 0
    assert domain["recall"] == 1
    assert alone["early"] >= 0.8
    assert added["answered"] >= max(0.3, 5 * alone["answered"])
    assert mean["answered"] <= 0.05
    assert added["recall"] >= 0.6
