from __future__ import annotations

import pytest

import gratis


@pytest.mark.parametrize("stream", ["sorted", "iid", "prior-shift", "sorted-prior-shift"])
def test_digits_stream(stream):
    task = gratis.task_catalogue["digits-stream"](stream=stream)
    subject = task.subject()

    def accuracy(method):
        with task.applied(subject, method) as measured:
            return task.measure(measured, seed=0)

    plain = accuracy(None)
    assert plain.metrics == accuracy(None).metrics
    assert 0.6 < plain.metrics["accuracy"] < 0.95
    assert sum(plain.items["accuracy"]) / len(plain.items["accuracy"]) == pytest.approx(plain.metrics["accuracy"])
    assert accuracy(gratis.LAME(weight=0.0)).metrics == plain.metrics
    if stream == "sorted":
        assert accuracy(gratis.LAME()).metrics["accuracy"] > plain.metrics["accuracy"] + 0.05


def test_image_stream_on_the_real_backbone():
    task = gratis.task_catalogue["image-stream"](crops=2)
    subject = task.subject()
    with task.applied(subject, None) as measured:
        first = task.measure(measured, seed=0)
        assert first.metrics == task.measure(measured, seed=0).metrics
    assert len(first.items["accuracy"]) == 12
