"""What can be merged: adapters, pipelines, tied heads, variants; and what is refused."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gratis
from gratis.contract.errors import FileError, InputError
from gratis.subjects.adapters import AdaptedCheckpoint
from gratis.subjects.checkpoint_writer import check_checksums
from gratis.subjects.checkpoints import RECORD, Checkpoint
from gratis.subjects.merging import merge, merge_state_dicts
from gratis.subjects.opening_checkpoints import open_checkpoint

HIDDEN, VOCABULARY = 24, 90


def base_tensors():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.layers.0.q_proj.weight": random(150, HIDDEN),
        "model.layers.0.q_proj.bias": random(150),
        "model.layers.0.conv.weight": random(8, 4, 3, 3),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }


def put(folder, tensors, name="model.safetensors", **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name, metadata={"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder, tensors, **config):
    put(folder, {f"base_model.model.{n}": t for n, t in tensors.items()}, "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(rows, columns, rank=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"rank_pattern": {"q_proj": 4}, "r": 16}, 2.0),
    ],
)
def test_an_adapter_is_weight_plus_scaled_product(tmp_path, config, scaling):
    tensors = base_tensors()
    base = Checkpoint(put(tmp_path / "base", tensors))
    a, b = factors(150, HIDDEN)
    made = adapter(
        tmp_path / "lora",
        {"model.layers.0.q_proj.lora_A.weight": a, "model.layers.0.q_proj.lora_B.weight": b},
        **config,
    )
    got = AdaptedCheckpoint(base, made)
    weight = tensors["model.layers.0.q_proj.weight"]
    expected = weight.double() + scaling * b.double() @ a.double()
    np.testing.assert_allclose(got.tensor("model.layers.0.q_proj.weight"), expected, atol=1e-5)
    whole = got.view("model.layers.0.q_proj.weight")
    for start, count in ((0, 1), (5, 1600), (1535, 3), (3599, 1)):
        assert torch.equal(got.view("model.layers.0.q_proj.weight", start, count), whole[start : start + count])
    for name in tensors:
        if "q_proj.weight" not in name:
            assert torch.equal(got.tensor(name), tensors[name])


def test_other_parts_of_an_adapter(tmp_path):
    tensors = base_tensors()
    base = Checkpoint(put(tmp_path / "base", tensors))
    a, b = factors(VOCABULARY, HIDDEN)
    conv_a, conv_b = torch.randn(4, 4, 3, 3), torch.randn(8, 4, 1, 1)
    head, bias = torch.randn(VOCABULARY, HIDDEN), torch.randn(150)
    qa, qb = factors(150, HIDDEN, seed=2)
    made = adapter(
        tmp_path / "lora",
        {
            "model.embed_tokens.lora_embedding_A": b.T,
            "model.embed_tokens.lora_embedding_B": a.T,
            "model.layers.0.conv.lora_A.weight": conv_a,
            "model.layers.0.conv.lora_B.weight": conv_b,
            "lm_head.weight": head,
            "model.layers.0.q_proj.lora_A.weight": qa,
            "model.layers.0.q_proj.lora_B.weight": qb,
            "model.layers.0.q_proj.lora_B.bias": bias,
        },
    )
    got = AdaptedCheckpoint(base, made)
    np.testing.assert_allclose(
        got.tensor("model.embed_tokens.weight"), tensors["model.embed_tokens.weight"] + 2 * b @ a, atol=1e-4
    )
    product = torch.einsum("or,rikl->oikl", conv_b[:, :, 0, 0], conv_a)
    np.testing.assert_allclose(
        got.tensor("model.layers.0.conv.weight"), tensors["model.layers.0.conv.weight"] + 2 * product, atol=1e-4
    )
    assert torch.equal(got.tensor("lm_head.weight"), head)
    assert torch.equal(got.tensor("model.layers.0.q_proj.bias"), tensors["model.layers.0.q_proj.bias"] + 2 * bias)


def test_transposed_weights_and_dora(tmp_path):
    weight = torch.randn(HIDDEN, 150)
    base = Checkpoint(put(tmp_path / "base", {"h.c_attn.weight": weight}))
    a, b = factors(150, HIDDEN)
    parts = {"h.c_attn.lora_A.weight": a, "h.c_attn.lora_B.weight": b}
    got = AdaptedCheckpoint(base, adapter(tmp_path / "lora", parts, fan_in_fan_out=True))
    np.testing.assert_allclose(got.tensor("h.c_attn.weight"), weight + 2 * (b @ a).T, atol=1e-4)

    tensors = base_tensors()
    other = Checkpoint(put(tmp_path / "other", tensors))
    lengths = torch.rand(150) + 1
    parts = {f"model.layers.0.q_proj.{n}": t for n, t in
             {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": lengths}.items()}  # fmt: skip
    got = AdaptedCheckpoint(other, adapter(tmp_path / "dora", parts, use_dora=True))
    changed = tensors["model.layers.0.q_proj.weight"].double() + 2 * (b @ a).double()
    expected = lengths[:, None] * changed / changed.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(got.tensor("model.layers.0.q_proj.weight"), expected, atol=1e-4)
    with pytest.raises(FileError, match="DoRA on .* scales columns"):
        parts = {"h.c_attn.lora_A.weight": a, "h.c_attn.lora_B.weight": b, "h.c_attn.lora_magnitude_vector": lengths}
        AdaptedCheckpoint(base, adapter(tmp_path / "columns", parts, fan_in_fan_out=True, use_dora=True))


def test_what_an_adapter_saves_beside_its_factors_is_what_they_change(tmp_path):
    generator = torch.Generator().manual_seed(3)
    table, a, b = (torch.randn(*shape, generator=generator) for shape in ((20, 12), (4, 20), (12, 4)))
    base = Checkpoint(put(tmp_path / "base", {"model.embed_tokens.weight": torch.zeros(20, 12)}))
    parts = {
        "model.embed_tokens.base_layer.weight": table,
        "model.embed_tokens.lora_embedding_A": a,
        "model.embed_tokens.lora_embedding_B": b,
    }
    got = AdaptedCheckpoint(base, adapter(tmp_path / "lora", parts)).view("model.embed_tokens.weight").view(20, 12)
    torch.testing.assert_close(got, table + 2 * a.T @ b.T)
    own, added = torch.randn(2, 12, generator=generator)
    base = Checkpoint(put(tmp_path / "other", {"q.weight": torch.zeros(12, 20), "q.bias": torch.zeros(12)}))
    factors = {"q.lora_A.weight": a, "q.lora_B.weight": b, "q.lora_B.bias": added, "q.base_layer.bias": own}
    got = AdaptedCheckpoint(base, adapter(tmp_path / "biases", factors)).view("q.bias")
    torch.testing.assert_close(got, own + 2 * added)


def test_adapters_are_merged_like_checkpoints(tmp_path):
    tensors = base_tensors()
    put(tmp_path / "base", tensors, model_type="tiny")
    experts = []
    for seed in (1, 2):
        a, b = factors(150, HIDDEN, seed=seed)
        parts = {"model.layers.0.q_proj.lora_A.weight": a, "model.layers.0.q_proj.lora_B.weight": b}
        experts.append(adapter(tmp_path / f"lora{seed}", parts))
    merge(gratis.TaskArithmetic(scale=0.5), base=tmp_path / "base", experts=experts, out=tmp_path / "out")
    base = Checkpoint(tmp_path / "base")
    dense = [{n: AdaptedCheckpoint(base, e).tensor(n) for n in tensors} for e in experts]
    expected = merge_state_dicts(gratis.TaskArithmetic(scale=0.5), dense, tensors)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    with pytest.raises(FileError, match=r"is an adapter: name the base it belongs to, or write MODEL\+ADAPTER"):
        merge(gratis.Average(), experts=experts, out=tmp_path / "no")
    named = open_checkpoint(f"{tmp_path / 'base'}+{experts[0]}")
    assert torch.equal(named.tensor("model.layers.0.q_proj.weight"), dense[0]["model.layers.0.q_proj.weight"])


@pytest.mark.parametrize(
    ("parts", "config", "message"),
    [
        ({}, {"peft_type": "IA3"}, "kind 'IA3'; only LORA"),
        ({}, {"r": 8}, "rank 4, but adapter_config.json says 8"),
        ({}, {"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"model.layers.0.q_proj.lora_B.weight": torch.zeros(151, 4)}, {}, "make 151 x 24 by rank 4"),
        ({"model.layers.7.q_proj.lora_A.weight": torch.zeros(4, 24)}, {}, "'model.layers.7.q_proj' is no module"),
        ({"model.nothing.weight": torch.zeros(4)}, {}, "belongs to no tensor"),
        ({"lm_head.weight": torch.zeros(3, 3)}, {}, r"has shape \[3, 3\]"),
        ({"model.layers.0.q_proj.lora_A.weight": torch.full((4, 24), math.nan)}, {}, "not finite"),
    ],
)
def test_adapters_that_are_refused(tmp_path, parts, config, message):
    base = Checkpoint(put(tmp_path / "base", base_tensors()))
    a, b = factors(150, HIDDEN)
    whole = {"model.layers.0.q_proj.lora_A.weight": a, "model.layers.0.q_proj.lora_B.weight": b, **parts}
    with pytest.raises((FileError, InputError), match=message):
        AdaptedCheckpoint(base, adapter(tmp_path / "lora", whole, **config))


def pipeline(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    unet = {
        "conv.weight": torch.randn(8, 4, 3, 3, generator=generator),
        "out.bias": torch.randn(5, generator=generator),
    }
    text = {"conv.weight": torch.randn(6, 6, generator=generator)}
    put(folder / "unet", unet, "diffusion_pytorch_model.safetensors", sample_size=8)
    put(folder / "unet", unet, "diffusion_pytorch_model.fp16.safetensors")
    put(folder / "text_encoder", text, hidden_size=6)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {"_class_name": "P", "unet": ["diffusers", "U"], "text_encoder": ["transformers", "T"],
             "scheduler": ["diffusers", "S"], "safety_checker": [None, None]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return unet, text


def test_a_pipeline_is_merged_component_by_component(tmp_path):
    both = [pipeline(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    out = tmp_path / "out"
    merge(gratis.Average(), experts=[tmp_path / "a", tmp_path / "b"], out=out, shard_bytes=900)
    expected = [merge_state_dicts(gratis.Average(), [one[k] for one in both]) for k in (0, 1)]
    index = json.loads((out / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    got = {n: load_file(out / "unet" / file)[n] for n, file in index["weight_map"].items()}
    assert all(torch.equal(got[n], expected[0][n]) for n in expected[0])
    text = load_file(out / "text_encoder" / "model.safetensors")
    assert torch.equal(text["conv.weight"], expected[1]["conv.weight"])
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (out / name).read_text() == (tmp_path / "a" / name).read_text()
    assert Checkpoint(out).places.keys() == Checkpoint(tmp_path / "a").places.keys()
    check_checksums(out)
    (tmp_path / "b" / "model_index.json").write_text('{"../unet": ["x", "y"]}')
    with pytest.raises(FileError, match="component outside its folder"):
        Checkpoint(tmp_path / "b")


def test_tied_heads_are_merged_once(tmp_path):
    tensors = base_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    put(tmp_path / "base", tensors, tie_word_embeddings=True)
    changed = {n: t + 1 for n, t in tensors.items()}
    put(tmp_path / "both", changed, tie_word_embeddings=True)
    put(tmp_path / "one", {n: t for n, t in changed.items() if n != "lm_head.weight"}, tie_word_embeddings=True)
    merge(gratis.DARE(), base=tmp_path / "base", experts=[tmp_path / "both", tmp_path / "one"], out=tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    changed["lm_head.weight"] += 1
    put(tmp_path / "untied", changed, tie_word_embeddings=True)
    with pytest.raises(InputError, match="has beyond the others lm_head.weight"):
        merge(gratis.DARE(), base=tmp_path / "base", experts=[tmp_path / "untied"], out=tmp_path / "out2")


def test_the_record_holds_recipe_and_checksums(tmp_path):
    put(tmp_path / "a", base_tensors(), model_type="tiny")
    out = tmp_path / "out"
    merge(gratis.Average(), experts=[tmp_path / "a", tmp_path / "a"], weights=[1, 3], out=out)
    record = json.loads((out / RECORD).read_text())
    assert record["recipe"]["method"] == "average"
    assert [e["weight"] for e in record["recipe"]["experts"]] == [1.0, 3.0]
    assert "method: average" in (out / "README.md").read_text()
    check_checksums(out)
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(FileError, match="checksum differs"):
        check_checksums(out)


def test_kinds_of_numbers_that_do_not_fit(tmp_path):
    put(tmp_path / "a", {"w": torch.ones(3)})
    put(tmp_path / "b", {"w": torch.ones(3, dtype=torch.int64)})
    put(tmp_path / "c", {"w": torch.ones(3, dtype=torch.bfloat16)})
    with pytest.raises(InputError, match=r"'w' holds torch.float32 in .* but torch.int64"):
        merge(gratis.Average(), experts=[tmp_path / "a", tmp_path / "b"], out=tmp_path / "out")
    merge(gratis.Average(), experts=[tmp_path / "a", tmp_path / "c"], out=tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].dtype == torch.float32


def test_links(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    put(tmp_path / "a", {"w": torch.ones(3)})
    (tmp_path / "a" / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(FileError, match="outside its folder"):
        merge(gratis.Average(), experts=[tmp_path / "a"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    snapshot = tmp_path / "hub" / "snapshots" / "1"
    blobs = tmp_path / "hub" / "blobs"
    put(blobs, {"w": torch.ones(3)}, "weights")
    (blobs / "settings").write_text('{"model_type": "tiny"}')
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blobs / "weights")
    (snapshot / "config.json").symlink_to(blobs / "settings")
    merge(gratis.Average(), experts=[snapshot], out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "tiny"}
    (tmp_path / "to_a").symlink_to(tmp_path / "a")
    with pytest.raises(FileError, match="would overwrite the input"):
        merge(gratis.Average(), experts=[tmp_path / "a"], out=tmp_path / "to_a", overwrite=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "nothing")
    for name in ("loop", "nowhere.safetensors"):
        with pytest.raises(FileError, match="There is no checkpoint"):
            Checkpoint(tmp_path / name)
    with pytest.raises(FileError, match="would write through the link"):
        merge(gratis.Average(), experts=[tmp_path / "a"], out=tmp_path / "loop")
    os.mkfifo(tmp_path / "a" / "more.safetensors")
    with pytest.raises(FileError, match="no regular file"):
        Checkpoint(tmp_path / "a")


def test_weights_that_could_run_code_are_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileError, match=r"only pytorch_model.bin: convert it"):
        Checkpoint(tmp_path)
