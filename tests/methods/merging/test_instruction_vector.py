"""The instruction vector: limits, kinship of the three models, what comes from whom, and the choice of its scale."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gratis
from gratis.contract.errors import GratisWarning, InputError
from gratis.methods.merging import instruction_vector
from gratis.methods.merging.instruction_vector import choose_scale, examine
from gratis.subjects.chat_answers import Answers
from gratis.subjects.merging import merge, merge_state_dicts
from tests import tiny_language as tiny
from tests.subjects.test_vocabularies import MERGES, model, row, tokens_of


def family(seed=0, size=0.02):
    """A base and two changes of it, as state dicts of a tiny language model."""
    base = {name: t.clone() for name, t in tiny.tiny_language_model().state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    changes = [{n: size * torch.randn(t.shape, generator=generator) * t.std() for n, t in base.items() if t.ndim == 2}
               for _ in range(2)]  # fmt: skip
    made = [{n: t + change[n] if n in change else t.clone() for n, t in base.items()} for change in changes]
    return base, *made


def test_averaging_would_halve_both_vectors():
    base, domain, instruct = family()
    merged = merge_state_dicts(gratis.InstructionVector(), [domain, instruct], base)
    mean = merge_state_dicts(gratis.Average(), [domain, instruct])
    for name in base:
        torch.testing.assert_close(merged[name] - base[name], 2 * (mean[name] - base[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_base_itself_it_gives_the_instruct_model_in_the_storage_dtype(dtype):
    """Also where the base is so much larger that float32 would lose the instruct model's value."""
    base = {"w": torch.tensor([65536.0, -3.0, 1.0, 70000.0]).to(dtype)}
    instruct = {"w": torch.tensor([0.7134, -3.0078, 1.0, 0.001]).to(dtype)}
    got = merge_state_dicts(gratis.InstructionVector(), [base, instruct], base)["w"]
    assert torch.equal(got, instruct["w"])


def test_several_domains_add_up_and_excluded_tensors_stay_the_domain_s():
    base, one, two = family()
    _, instruct, _ = family(seed=3)
    got = merge_state_dicts(gratis.InstructionVector(), [one, two, instruct], base, [0.5, 0.25, 1.0])
    for name in base:
        expected = base[name] + 0.5 * (one[name] - base[name]) + 0.25 * (two[name] - base[name])
        torch.testing.assert_close(got[name], expected + instruct[name] - base[name], rtol=0, atol=1e-6)
    method = gratis.InstructionVector(exclude=("mlp",))
    got = merge_state_dicts(method, [one, instruct], base)
    for name in base:
        assert torch.equal(got[name], one[name]) == ("mlp" in name or torch.equal(instruct[name], base[name]))
    with pytest.raises(InputError, match="needs two experts"):
        merge_state_dicts(method, [one], base)
    with pytest.warns(GratisWarning, match="scale of 3"):
        gratis.InstructionVector(scale=3.0)


def test_kinship_is_that_of_numpy():
    base, domain, instruct = family()
    found = examine(base, domain, instruct)
    changes = [
        {n: (m[n].double() - base[n].double()).numpy().ravel() for n in base} for m in (domain, instruct)
    ]  # fmt: skip

    def cosine(names):
        d, i = (np.concatenate([change[n] for n in names]) for change in changes)
        return d @ i / np.linalg.norm(d) / np.linalg.norm(i)

    assert found.cosine == pytest.approx(cosine(base), abs=1e-12)
    for layer in range(tiny.LAYERS):
        assert found.by_layer[layer] == pytest.approx(cosine([n for n in base if f"layers.{layer}." in n]), abs=1e-12)
    for kind, part in (("attention", "attn"), ("MLP", "mlp"), ("embedding", "embed|lm_head")):
        assert found.by_kind[kind] == pytest.approx(cosine([n for n in base if re.search(part, n)]), abs=1e-12)
    assert abs(found.cosine) < 0.1, "random changes are independent"
    assert 0.3 < found.sign_agreement < 0.7
    size = np.sqrt(sum(float(t.double().square().sum()) for t in base.values()))
    for which, change in zip((found.domain_size, found.instruct_size), changes, strict=True):
        assert which == pytest.approx(np.sqrt(sum(c @ c for c in change.values())) / size, abs=1e-12)
    assert not found.warnings


def test_signs_agree_where_the_changes_are_the_same_and_not_where_they_are_opposite():
    base, domain, _ = family()
    with pytest.warns(GratisWarning, match="instructed already"):
        same = examine(base, domain, domain)
    assert same.sign_agreement == 1
    assert same.cosine == pytest.approx(1)
    opposite = {n: 2 * base[n] - domain[n] for n in base}
    assert examine(base, domain, opposite).sign_agreement == 0


def test_a_wrong_base_is_seen_in_five_tensors(monkeypatch):
    base, domain, instruct = family()
    other = {
        n: torch.randn(t.shape, generator=torch.Generator().manual_seed(9)) * t.std().nan_to_num(0)
        for n, t in base.items()
    }
    seen = []
    products = instruction_vector._products
    monkeypatch.setattr(instruction_vector, "_products", lambda *a: seen.append(len(a[3])) or products(*a))
    with pytest.warns(GratisWarning, match=r"differs from the base by 1\.\d\d of its size.*right base"):
        found = examine(other, domain, instruct)
    assert seen[0] == 5
    assert 1.2 < found.domain_size < 1.6


def test_what_examine_refuses():
    base, domain, instruct = family()
    with pytest.raises(InputError, match="the same"):
        examine(base, base, base)
    domain["model.norm.weight"] = torch.full_like(base["model.norm.weight"], torch.nan)
    with pytest.raises(InputError, match=r"'model\.norm\.weight'.*not finite"):
        examine(base, domain, instruct)
    del domain["model.norm.weight"]
    with pytest.raises(InputError, match="lacks"):
        examine(base, domain, instruct)


@pytest.fixture
def three(tmp_path):
    """A base, a domain model with a token and positions of its own, an instruct model with two tokens of its own."""
    base = ["a", "b", "c", "ab", "bc", "<s>", "</s>"]
    made = {
        "base": model(tmp_path / "base", base, MERGES["a"], 0),
        "domain": model(tmp_path / "domain", [*base, "<eur>"], MERGES["a"], 0.25),
        "instruct": model(tmp_path / "instruct", [*base, "<user>", "<end>"], MERGES["a"], 0.5),
    }
    for name, extra in (
        ("domain", {"rope_theta": 1e6, "max_position_embeddings": 4096}),
        ("instruct", {"eos_token_id": 8}),
    ):
        config = json.loads((made[name] / "config.json").read_text())
        (made[name] / "config.json").write_text(json.dumps({**config, **extra}))
    for name in made:
        (made[name] / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 9}))
        (made[name] / "generation_config.json").write_text(json.dumps({"eos_token_id": 6}))
    (made["instruct"] / "chat_template.jinja").write_text("<user>{{ messages[0].content }}<end>")
    (made["instruct"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 6]}))
    return made


def test_added_tokens_are_copied_whole_and_the_ends_are_the_instruct_model_s(three, tmp_path):
    out = tmp_path / "out"
    merge(
        gratis.InstructionVector(), base=three["base"], experts=[three["domain"], three["instruct"]], out=out,
        tokenizer="union",
    )  # fmt: skip
    tokens, rows = tokens_of(out), load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(rows[tokens["ab"]], row("ab", 0.75))
    torch.testing.assert_close(rows[tokens["<eur>"]], row("<eur>", 0.25))
    for token in ("<user>", "<end>"):
        torch.testing.assert_close(rows[tokens[token]], row(token, 0.5))
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 1e6
    assert config["max_position_embeddings"] == 4096
    assert config["vocab_size"] == len(rows) == 10
    assert config["eos_token_id"] == tokens["<end>"] == 9, "the instruct model's 8 in the numbers of the result"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [9, tokens["</s>"]]
    assert (out / "chat_template.jinja").read_text().startswith("<user>")


def test_examine_reads_settings_and_wants_a_chat_template(three):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GratisWarning)
        found = examine(three["base"], three["domain"], three["instruct"], tokenizer="union")
    for key in ("rope_theta from None to 1000000", "max_position_embeddings"):
        assert any(f"changed {key}" in text for text in found.warnings)
    (three["instruct"] / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        examine(three["base"], three["domain"], three["instruct"], tokenizer="union")


def test_clashing_numbers_of_added_tokens_are_refused_without_a_policy(three, tmp_path):
    with pytest.raises(InputError, match="vocab_size|tokenizers"):
        merge(
            gratis.InstructionVector(), base=three["base"], experts=[three["domain"], three["instruct"]],
            out=tmp_path / "out",
        )  # fmt: skip


class Scripted(torch.nn.Module):
    """Not a language model: `choose_scale` is given its answers."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("formed", "perplexities", "expected"),
    [
        ({0.25: 0.2, 0.5: 0.96, 0.75: 1.0, 1.0: 1.0}, {0.25: 8, 0.5: 8, 0.75: 8, 1.0: 8}, 0.5),
        ({0.25: 0.2, 0.5: 0.94, 0.75: 1.0, 1.0: 1.0}, {0.25: 8, 0.5: 8, 0.75: 8, 1.0: 8}, 0.75),
        ({0.25: 0.2, 0.5: 0.5, 0.75: 1.0, 1.0: 1.0}, {0.25: 8, 0.5: 8.3, 0.75: 8.41, 1.0: 9}, 0.5),
    ],
)
def test_the_smallest_scale_that_is_nearly_the_best_within_the_bound(monkeypatch, formed, perplexities, expected):
    live = Scripted()
    vector = gratis.Delta({"weight": {"full": torch.ones(1)}}, label="instruction")
    prompts = [f"prompt {n}" for n in range(100)]

    def answers(domain, tokenizer, asked, longest):
        scale = round(live.weight.item(), 2)
        good = round(100 * formed.get(scale, 0.0))
        # The others end too, but repeat what was asked.
        texts = ["fine" if n < good else f"You said: {asked[n].upper()}" for n in range(100)]
        return Answers(texts, [True] * 100, 1)

    monkeypatch.setattr(instruction_vector, "answers", answers)
    monkeypatch.setattr(
        instruction_vector, "perplexity", lambda *a: perplexities.get(round(live.weight.item(), 2), 8.0)
    )
    found = choose_scale(live, vector, None, texts=["x"], prompts=prompts, scales=(0.25, 0.5, 0.75, 1.0))
    assert found.scale == expected
    assert [one["scale"] for one in found.rows] == [0, 0.25, 0.5, 0.75, 1.0]
    assert live.weight.item() == 0, "the model comes back as it was"


def test_choose_scale_says_when_there_is_nothing_to_choose(monkeypatch):
    live, vector = Scripted(), gratis.Delta({"weight": {"full": torch.ones(1)}})
    monkeypatch.setattr(instruction_vector, "answers", lambda *a: Answers(["x"], [False], 1))
    monkeypatch.setattr(instruction_vector, "perplexity", lambda *a: 1.0 + 10 * live.weight.item())
    with pytest.raises(InputError, match="more than 5%"):
        choose_scale(live, vector, None, texts=["x"], prompts=["y"])
    monkeypatch.setattr(instruction_vector, "perplexity", lambda *a: 1.0)
    with pytest.raises(InputError, match="No answer is well-formed"):
        choose_scale(live, vector, None, texts=["x"], prompts=["y"])
    with pytest.raises(InputError, match="not one string"):
        choose_scale(live, vector, None, texts="x", prompts=["y"])
    with pytest.raises(InputError, match="empty"):
        choose_scale(live, vector, None, texts=[], prompts=["y"])
    assert live.weight.item() == 0


def test_perplexity_is_that_of_the_rows_one_by_one():
    live = tiny.tiny_language_model()
    rows = {"one": [5, 6, 7, 8], "two": [9, 10]}

    def tokenizer(text):
        return {"input_ids": rows[text]}

    losses = []
    for ids in rows.values():
        logs = live(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logs[place, ids[place + 1]] for place in range(len(ids) - 1)]
    expected = torch.stack(losses).mean().exp().item()
    assert instruction_vector.perplexity(live, tokenizer, list(rows)) == pytest.approx(expected, rel=1e-5)


def test_the_vector_on_a_live_model_is_the_merge(tmp_path):
    base, domain, instruct = family()
    live = tiny.tiny_language_model()
    live.load_state_dict(domain)
    vector = gratis.Delta.between(base, instruct)
    merged = merge_state_dicts(gratis.InstructionVector(scale=0.5), [domain, instruct], base)
    with gratis.attach(live, vector) as handle:
        handle.turn(0.5)
        for name, tensor in live.state_dict().items():
            torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)


def test_names_of_files_are_accepted_too(tmp_path):
    base, domain, instruct = family()
    paths = []
    for number, state in enumerate((base, domain, instruct)):
        kept = {n: t.clone() for n, t in state.items() if n != "lm_head.weight"}
        save_file(kept, tmp_path / f"{number}.safetensors")
        paths.append(tmp_path / f"{number}.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(examine(*paths).cosine) < 0.1
