"""Plan, statistics and page of a merge; the numbers against what was built in."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gratis.contract.errors import FileError
from gratis.subjects.merge_recipe import load_recipe
from gratis.trials.merge_report import _pieces, heat_map, merge_statistics, plan_merge, render, save_report


@pytest.fixture
def folder(tmp_path):
    """Two experts that agree in layer 0, oppose each other in layer 1, and change different halves in layer 2."""
    base = {f"layers.{n}.w": torch.zeros(64, 64) for n in range(3)} | {"count": torch.tensor([3])}
    half = torch.zeros(64, 64)
    half[:32] = 1
    one = {"layers.0.w": 1.0, "layers.1.w": 1.0, "layers.2.w": half}
    two = {"layers.0.w": 2.0, "layers.1.w": -2.0, "layers.2.w": 1 - half}
    for name, changes in (("base", {}), ("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        tensors = {n: (t + changes[n] if n in changes else t).clone() for n, t in base.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def merged(folder, text):
    (folder / "recipe.yaml").write_text(text)
    recipe = load_recipe(folder / "recipe.yaml")
    recipe.run(folder / "out", overwrite=True)
    return recipe, {t.name: t for t in merge_statistics(recipe, folder / "out").tensors}


def test_conflicts_are_what_was_built_in(folder):
    _, found = merged(folder, "method: task-arithmetic\nparameters: {scale: 1}\nbase: base\nexperts: [one, two]\n")
    assert list(found) == ["layers.0.w", "layers.1.w", "layers.2.w"]
    assert [t.sign_disagreement for t in found.values()] == [0, 1, None]
    assert [t.cosine for t in found.values()] == pytest.approx([1, -1, 0])
    assert found["layers.0.w"].sizes == (1, 2)
    assert found["layers.0.w"].size == 3
    assert found["layers.1.w"].kept == (0, 1)
    assert found["layers.1.w"].overruled == (1, 0)
    assert all(t.trimmed == (0, 0) for t in found.values())


def test_what_ties_trims_is_counted(folder):
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        save_file({"w": torch.randn(100, 50, generator=generator)}, folder / name / "model.safetensors")
    save_file({"w": torch.zeros(100, 50)}, folder / "base" / "model.safetensors")
    text = "method: ties\nparameters: {density: 0.3, scope: %s}\nbase: base\nexperts: [one, two]\n"
    for scope in ("tensor", "global"):
        _, found = merged(folder, text % scope)
        assert found["w"].trimmed == pytest.approx((0.7, 0.7), abs=0.01)


def test_what_dare_drops_is_counted_as_the_merge_dropped_it(folder):
    recipe, found = merged(folder, "method: dare\nparameters: {density: 0.4}\nbase: base\nexperts: [one, two]\n")
    out = {t.name: t for t in merge_statistics(recipe, folder / "out").tensors}
    both = found["layers.2.w"]
    # The experts change different entries, so an entry of the result moved exactly where it was not dropped.
    assert both.kept == pytest.approx([1 - share for share in both.trimmed])
    assert both.trimmed == pytest.approx((0.6, 0.6), abs=0.05)
    assert out == found


def test_without_a_base_changes_are_from_the_mean(folder):
    _, found = merged(folder, "method: average\nexperts: [one, two]\n")
    assert found["layers.0.w"].cosine == pytest.approx(-1)
    assert found["layers.0.w"].size == 0


def test_rules_are_reported_with_their_own_method_and_experts(folder):
    text = "method: average\nexperts: [one, two]\nrules: [{tensors: layers.1.w, method: slerp, experts: [1, 0]}]\n"
    _, found = merged(folder, text)
    assert {t.method for t in found.values()} == {"average", "slerp"}
    assert found["layers.1.w"].experts == (1, 0)


def test_large_tensors_are_sampled_where_random_streams_begin():
    assert _pieces(0) == []
    assert _pieces(65536) == [(0, 65536)]
    pieces = _pieces(10_000_000)
    assert sum(count for _, count in pieces) == 65536
    assert all(start % 65536 == 0 and start + count <= 10_000_000 for start, count in pieces)
    assert pieces[-1][0] > 9_000_000


def test_the_plan_knows_bytes_and_passes(folder):
    (folder / "recipe.yaml").write_text("method: ties\nbase: base\nexperts: [one, two]\ndtype: bfloat16\n")
    plan = plan_merge(load_recipe(folder / "recipe.yaml"), folder / "deep" / "out", threads=2)
    assert plan.bytes_read == 3 * (3 * 64 * 64 * 4 + 8)
    assert plan.bytes_written == 3 * 64 * 64 * 2 + 8
    assert plan.passes == 2
    assert plan.seconds > 0
    assert not (folder / "deep").exists()


def test_a_disk_that_is_too_small_is_seen_before_anything_begins(folder, monkeypatch):
    import shutil

    (folder / "recipe.yaml").write_text("method: average\nexperts: [one, two]\n")
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FileError, match="1.00 kB free; the merge needs 49.2 kB"):
        plan_merge(load_recipe(folder / "recipe.yaml"), folder / "out")


def test_the_page_stands_alone_and_shows_every_tensor(folder):
    recipe, _ = merged(folder, "method: ties\nbase: base\nexperts: [one, two]\n")
    seen = merge_statistics(recipe, folder / "out")
    page, data = save_report(recipe, seen, folder / "out", plan=plan_merge(recipe, folder / "out"), seconds=1.5)
    text = page.read_text()
    assert text == render(recipe, seen, plan=None, out=folder / "out") or "plan" in text
    assert "http" not in text
    assert "<script" not in text
    assert all(t.name in text for t in seen.tensors)
    assert json.loads(data.read_text())["statistics"]["tensors"][0]["name"] == "layers.0.w"


def test_names_cannot_put_markup_into_the_page(folder):
    for name in ("one", "two"):
        save_file({"<script>x": torch.ones(2) * (name == "one")}, folder / name / "model.safetensors")
    (folder / "recipe.yaml").write_text("method: average\nexperts: [one, two]\n")
    recipe = load_recipe(folder / "recipe.yaml")
    recipe.run(folder / "out")
    assert "<script" not in render(recipe, merge_statistics(recipe, folder / "out"))


def test_the_map_has_a_cell_per_layer_and_kind(folder):
    _, found = merged(folder, "method: average\nexperts: [one, two]\n")
    drawn = heat_map(list(found.values()), lambda t: t.cosine, 0.0, 1.0)
    assert drawn.count("<title>") == 3
    assert "layers.*.w" in drawn


def test_adapters_are_planned_and_reported_as_they_are_merged(folder):
    (folder / "lora").mkdir()
    down, up = torch.ones(1, 64), torch.zeros(64, 1)
    up[:16] = 3
    module = "base_model.model.layers.1"
    (folder / "base" / "model.safetensors").unlink()
    save_file({f"layers.{n}.weight": torch.zeros(64, 64) for n in range(2)}, folder / "base" / "model.safetensors")
    save_file(
        {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, folder / "lora" / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    for expert in ("lora", "base+lora"):
        text = f"method: task-arithmetic\nparameters: {{scale: 1}}\nbase: base\nexperts: [{expert}]\n"
        recipe, found = merged(folder, text)
        assert plan_merge(recipe, folder / "other").bytes_written == 2 * 64 * 64 * 4
        assert found["layers.0.weight"].size == 0
        assert found["layers.1.weight"].sizes == pytest.approx((1.5,))
        assert found["layers.1.weight"].size == pytest.approx(1.5)


def test_a_gguf_file_is_planned_and_reported_as_the_folder_it_stands_for(tmp_path):
    import gguf

    names = {
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "output_norm.weight": "model.norm.weight",
    }
    writer = gguf.GGUFWriter(str(tmp_path / "one.gguf"), "llama")
    for key, value in (("block_count", 1), ("embedding_length", 8), ("feed_forward_length", 8), ("head_count", 2)):
        getattr(writer, f"add_{key}")(value)
    for number, name in enumerate(names):
        writer.add_tensor(name, np.full(8, number + 1.0, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "two").mkdir()
    save_file({name: torch.full((8,), 5.0) for name in names.values()}, tmp_path / "two" / "model.safetensors")
    recipe, found = merged(tmp_path, "method: average\nexperts: [two, one.gguf]\n")
    assert plan_merge(recipe, tmp_path / "other").bytes_written == 2 * 8 * 4
    assert {name: t.sizes for name, t in found.items()} == {
        "model.layers.0.input_layernorm.weight": (2, 2), "model.norm.weight": (1.5, 1.5)
    }  # fmt: skip


def test_a_pipeline_is_planned_and_reported_by_component(tmp_path):
    for name, value in (("one", 1.0), ("two", 4.0)):
        for part in ("unet", "text_encoder"):
            (tmp_path / name / part).mkdir(parents=True)
            save_file({"w": torch.full((4,), value)}, tmp_path / name / part / "model.safetensors")
        index = {"_class_name": "P", "unet": ["diffusers", "U"], "text_encoder": ["transformers", "T"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    recipe, found = merged(tmp_path, "method: average\nexperts: [one, two]\n")
    assert plan_merge(recipe, tmp_path / "other").tensors == 2
    assert {name: t.sizes for name, t in found.items()} == dict.fromkeys(("unet/w", "text_encoder/w"), (1.5, 1.5))


def test_rows_of_tokens_are_compared_in_one_order(folder):
    for name, order in (("one", "ab"), ("two", "ba")):
        vocabulary = {token: number for number, token in enumerate(order)}
        content = {"model": {"type": "WordLevel", "unk_token": "a", "vocab": vocabulary}, "added_tokens": []}
        (folder / name / "tokenizer.json").write_text(json.dumps(content))
        (folder / name / "config.json").write_text(json.dumps({"vocab_size": 2}))
        rows = torch.tensor([[1.0, 2.0] if token == "a" else [3.0, -4.0] for token in order])
        save_file({"embed.weight": rows}, folder / name / "model.safetensors")
    recipe, found = merged(folder, "method: average\nexperts: [one, two]\ntokenizer: base\n")
    assert found["embed.weight"].sizes == (0, 0)
    assert plan_merge(recipe, folder / "other").bytes_written == 16


def test_matrices_that_are_merged_by_singular_vectors_have_an_account(folder):
    """Two changes of rank one along the same left vector, whose right vectors have a cosine of 0.6."""
    u, v = torch.zeros(2, 64), torch.zeros(2, 64)
    u[:, 0] = 1
    v[0, 0], v[1, 0], v[1, 1] = 1, 0.6, 0.8
    for place, (name, size) in enumerate((("one", 2.0), ("two", 3.0))):
        tensors = {f"layers.{n}.w": size * torch.outer(u[place], v[place]) for n in range(3)}
        save_file(tensors, folder / name / "model.safetensors")
    save_file({f"layers.{n}.w": torch.zeros(64, 64) for n in range(3)}, folder / "base" / "model.safetensors")
    (folder / "recipe.yaml").write_text("method: tsvm\nbase: base\nexperts: [one, two]\n")
    recipe = load_recipe(folder / "recipe.yaml")
    recipe.run(folder / "out")
    statistics = merge_statistics(recipe, folder / "out")
    assert [m.name for m in statistics.matrices] == ["layers.0.w", "layers.1.w", "layers.2.w"]
    for matrix in statistics.matrices:
        assert matrix.kept_energy == pytest.approx((1, 1))
        assert matrix.interference == pytest.approx(0.6 * (2 + 3), rel=1e-4)
        assert matrix.interference_after == pytest.approx(0, abs=1e-4)
    assert "interference undone" in render(recipe, statistics)


def test_other_merges_have_no_account(folder):
    recipe, _ = merged(folder, "method: ties\nparameters: {density: 0.5}\nbase: base\nexperts: [one, two]\n")
    statistics = merge_statistics(recipe, folder / "out")
    assert statistics.matrices == ()
    assert "interference" not in render(recipe, statistics)
