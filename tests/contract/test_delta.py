from __future__ import annotations

import pytest
import torch

import gratis
from gratis.contract.errors import FileError, InputError, SubjectError
from tests import tiny_language as tiny


@pytest.fixture
def pair():
    base, tuned = tiny.tiny_language_model(0), tiny.tiny_language_model(0)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "mlp" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    return base, tuned


def test_attached_it_is_the_tuned_model_and_detached_the_base(pair):
    base, tuned = pair
    delta = gratis.Delta.between(base, tuned)
    assert all("mlp" in name for name in delta.names)
    before, plain = tiny.snapshot(base), tiny.run(base)
    with gratis.attach(base, delta) as handle:
        torch.testing.assert_close(tiny.run(base), tiny.run(tuned), atol=1e-4, rtol=1e-4)
        assert handle.report()["delta"]["weights_changed"] == len(delta.names)
    assert tiny.snapshot(base) == before
    assert torch.equal(tiny.run(base), plain)


def test_strength_zero_changes_nothing(pair):
    base, tuned = pair
    plain = tiny.run(base)
    with gratis.attach(base, gratis.Delta.between(base, tuned).scaled(0)):
        assert torch.equal(tiny.run(base), plain)


@pytest.mark.parametrize("form", ["full", "low rank", "sparse"])
def test_files_round_trip(pair, form, tmp_path):
    delta = gratis.Delta.between(*pair, label="mine").scaled(0.5)
    delta = {"full": delta, "low rank": delta.low_rank(2), "sparse": delta.sparse(0.1)}[form]
    delta.save(tmp_path / "d.safetensors")
    assert gratis.Delta.load(tmp_path / "d.safetensors") == delta
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_low_rank_is_the_best_approximation_and_sparse_keeps_the_largest(pair):
    delta = gratis.Delta.between(*pair)
    name = next(n for n in delta.names if n.endswith("weight"))
    dense, low, sparse = delta.dense(name), delta.low_rank(3), delta.sparse(0.1)
    s = torch.linalg.svdvals(dense)
    assert (dense - low.dense(name)).norm().item() == pytest.approx(s[3:].norm().item(), rel=1e-4)
    kept = sparse.dense(name) != 0
    assert int(kept.sum()) == int(0.1 * dense.numel())
    assert dense[kept].abs().min() >= dense[~kept].abs().max()
    assert low.bytes < delta.bytes
    assert sparse.bytes < delta.bytes


def test_two_deltas_come_off_in_any_order(pair):
    base, tuned = pair
    plain = tiny.snapshot(base)
    a, b = gratis.Delta.between(base, tuned, label="a"), gratis.Delta.between(base, tuned, label="b").scaled(-1)
    first, second = gratis.attach(base, a), gratis.attach(base, b)
    first.detach()
    second.detach()
    assert tiny.snapshot(base) == plain


def test_what_does_not_fit(pair, tmp_path):
    base, tuned = pair
    delta = gratis.Delta.between(base, tuned)
    with pytest.raises(SubjectError, match="does not have"):
        gratis.attach(torch.nn.Linear(3, 3), delta)
    with pytest.raises(SubjectError, match="torch module"):
        gratis.attach(Ellipsis.__class__, delta)
    with pytest.raises(InputError, match="different weights"):
        gratis.Delta.between({"a": torch.zeros(2)}, {"b": torch.zeros(2)})
    with pytest.raises(InputError, match="shape"):
        gratis.Delta.between({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
    with pytest.raises(InputError, match="not finite"):
        gratis.Delta.between({"a": torch.zeros(2)}, {"a": torch.tensor([1.0, float("nan")])})
    with pytest.raises(InputError, match="rank"):
        delta.low_rank(0)
    with pytest.raises(InputError, match="density"):
        delta.sparse(0)
    for content in (b"", b"garbage", b"\x08\0\0\0\0\0\0\0{}      "):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(FileError):
            gratis.Delta.load(tmp_path / "bad")
    with pytest.raises(FileError, match="cannot be read"):
        gratis.Delta.load(tmp_path / "absent")


def test_between_checkpoint_folders(pair, tmp_path):
    base, tuned = pair
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    assert gratis.Delta.between(tmp_path / "base", tmp_path / "tuned") == gratis.Delta.between(base, tuned)
