from __future__ import annotations

import numpy as np
import pytest
import torch

from gratis.contract.errors import InputError
from gratis.subjects.block_store import BlockStore, HotBlocks


def filled(place, count=40, rows=2):
    store = BlockStore(place, "Test")
    blocks = torch.arange(count * rows * 2 * 3 * 4).float().view(count, rows, 2, 3, 4)
    for at in range(0, count, 7):
        store.append(blocks[at : at + 7], -blocks[at : at + 7])
    return store, blocks


def places(*numbers):
    return np.array(numbers, dtype=np.int64)


@pytest.mark.parametrize("place", ["memory", "device", "file"])
def test_what_was_appended_is_read_back(place):
    store, blocks = filled(place)
    keys, values = store.read(places(39, 0, 17), places(1, 0, 1))
    torch.testing.assert_close(keys, blocks[[39, 0, 17], [1, 0, 1]])
    torch.testing.assert_close(values, -keys)
    assert store.stored_bytes == 2 * blocks.nbytes
    assert store.near == (place != "file")


@pytest.mark.parametrize("place", ["memory", "file"])
def test_rows_can_be_chosen(place):
    store, blocks = filled(place)
    store.select_rows(torch.tensor([1, 1, 0]))
    store.append(blocks[:1, [0, 1, 0]], blocks[:1, [0, 1, 0]])
    torch.testing.assert_close(
        store.read(places(5, 5, 40), places(0, 2, 1))[0], torch.stack([blocks[5, 1], blocks[5, 0], blocks[0, 1]])
    )


def test_a_file_leaves_no_name_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    store, _ = filled("file")
    assert list(tmp_path.iterdir()) == []
    assert store.bytes == 0


def test_a_full_disk_is_a_sentence(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match="No space left on device; point TMPDIR at a larger disk"):
        filled("file")


def test_memory_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(
        "gratis.subjects.block_store.psutil.virtual_memory", lambda: type("Free", (), {"available": 10})
    )
    with pytest.raises(InputError, match="store='file'"):
        filled("memory")


def reading(hot, store, blocks):
    numbers, rows = places(*blocks), np.zeros(len(blocks), dtype=np.int64)
    return hot.read(store, numbers, rows, np.stack([numbers, rows]))[0]


def test_hot_blocks_are_those_used_last():
    store, blocks = filled("file")
    hot = HotBlocks(3, "lru", 0.1, torch.device("cpu"))
    for wanted in ([1, 2], [3], [1], [4]):
        torch.testing.assert_close(reading(hot, store, wanted), blocks[wanted, 0])
    assert {block for block, _ in hot.held} == {3, 1, 4}
    assert hot.counts == {"hot_hits": 1, "hot_misses": 4}


def test_a_selection_larger_than_the_slots_is_read_all_the_same():
    store, blocks = filled("file")
    hot = HotBlocks(2, "lru", 0.1, torch.device("cpu"))
    for _ in range(2):
        torch.testing.assert_close(reading(hot, store, [5, 6, 7, 8, 5]), blocks[[5, 6, 7, 8, 5], 0])


def test_what_is_attended_to_stays():
    store, _ = filled("file")
    hot = HotBlocks(3, "lru-s", 0.1, torch.device("cpu"))
    reading(hot, store, [1, 2, 3])
    hot.attended(places(1, 2, 3), places(0, 0, 0), np.array([0.2, 5.0, 0.5]))
    reading(hot, store, [4])
    assert {block for block, _ in hot.held} == {4, 2, 3}
