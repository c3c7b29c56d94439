"""Merges on a CUDA device: the bytes of a processor where weights are combined one by one, close to them elsewhere."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import gratis
from gratis.contract.errors import ParameterError
from gratis.subjects.merging import merge, merge_state_dicts

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SAME = {
    "average": (gratis.Average(), 3),
    "task-arithmetic": (gratis.TaskArithmetic(scale=0.4), 3),
    "ties, global": (gratis.TIES(density=0.3), 3),
    "ties, per tensor": (gratis.TIES(density=0.5, scope="tensor", divisor="weight"), 3),
    "dare": (gratis.DARE(density=0.5), 3),
    "dare-ties, trimmed": (gratis.DARETIES(density=0.5, trim=0.5), 3),
    "breadcrumbs": (gratis.Breadcrumbs(density=0.8, outliers=0.05), 3),
    "magmax": (gratis.MagMax(), 3),
    "consensus": (gratis.Consensus(), 3),
    "emr": (gratis.EMR(), 3),
    "ram": (gratis.RAM(), 3),
    "passthrough": (gratis.Passthrough(scale=0.5), 1),
}
CLOSE = {
    "della": (gratis.DELLA(), 3),
    "model-stock": (gratis.ModelStock(), 3),
    "slerp": (gratis.SLERP(t=0.3), 2),
    "nu-slerp": (gratis.NuSLERP(), 2),
    "multi-slerp": (gratis.MultiSLERP(), 3),
    "karcher": (gratis.Karcher(), 3),
    "near-swap": (gratis.NearSwap(), 2),
    "sce": (gratis.SCE(density=0.5), 3),
    "pcb": (gratis.PCB(), 3),
    "iso-c": (gratis.IsoC(), 3),
    "tsvm": (gratis.TSVM(), 3),
    "r-tsvm": (gratis.RTSVM(), 3),
    "wudi": (gratis.WUDI(iterations=20), 3),
}


def tensors(dtype=torch.float32):
    """A base and three models whose weights differ from it by a fifth of their spread."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (300, 512), "b.weight": (64, 64), "c.bias": (70,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = [
        {name: (t + 0.2 * torch.randn(t.shape, generator=generator)).to(dtype) for name, t in base.items()}
        for _ in range(3)
    ]
    return {name: t.to(dtype) for name, t in base.items()}, experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "count"), SAME.values(), ids=SAME)
def test_the_same_bytes(method, count, dtype):
    base, experts = tensors(dtype)
    here = merge_state_dicts(method, experts[:count], base)
    there = merge_state_dicts(method, experts[:count], base, device=DEVICE)
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize(("method", "count"), CLOSE.values(), ids=CLOSE)
def test_close_to_a_processor(method, count):
    base, experts = tensors()
    here = merge_state_dicts(method, experts[:count], base)
    there = merge_state_dicts(method, experts[:count], base, device=DEVICE)
    for name, values in here.items():
        torch.testing.assert_close(there[name], values, rtol=1e-4, atol=1e-4)


def test_from_disk_to_disk_and_devices_that_are_not_there(tmp_path):
    base, experts = tensors(torch.bfloat16)
    for name, content in {"base": base, "a": experts[0], "b": experts[1]}.items():
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
    named = {"base": tmp_path / "base", "experts": [tmp_path / "a", tmp_path / "b"]}
    method = gratis.TIES(density=0.4)
    merge(method, out=tmp_path / "here", **named)
    merge(method, out=tmp_path / "there", device=["cuda", "cpu"], stretch=65536, **named)
    here, there = (load_file(tmp_path / name / "model.safetensors") for name in ("here", "there"))
    assert all(torch.equal(here[name], there[name]) for name in here)
    with pytest.raises(ParameterError, match="There is no device cuda:99"):
        merge(method, out=tmp_path / "nowhere", device="cuda:99", **named)
