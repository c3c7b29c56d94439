from __future__ import annotations

import time

import pytest

from gratis.trials.memory import PeakMemory, resident_bytes


def test_a_peak_inside_the_block_is_seen_after_it_is_gone():
    with PeakMemory() as memory:
        held = bytearray(b"x") * 120_000_000
        time.sleep(0.05)
        del held
    assert 100 < memory.megabytes < 200
    with PeakMemory() as after:
        time.sleep(0.02)
    assert after.megabytes < 20
    assert after.device_megabytes is None


def test_the_sampler_ends_with_the_block_also_after_an_exception():
    with pytest.raises(ValueError), PeakMemory() as memory:
        raise ValueError
    assert not memory._thread.is_alive()
    assert resident_bytes() > 1_000_000
