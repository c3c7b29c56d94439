"""Recipes: gratis's form with rules, mergekit's form against its documented arithmetic, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gratis
from gratis.contract.errors import FileError, GratisWarning, InputError
from gratis.subjects.merge_recipe import load_recipe
from gratis.subjects.merge_rules import Rule
from gratis.subjects.merging import merge, merge_recipe, merge_state_dicts

LAYERS = 4


@pytest.fixture
def folder(tmp_path):
    """Base and three fine-tunes of four layers, with attention and MLP matrices."""
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{n}.{part}.weight" for n in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj")]
    for model in ("base", "ft0", "ft1", "ft2"):
        (tmp_path / model).mkdir()
        tensors = {name: torch.randn(6, 5, generator=generator) for name in names}
        save_file(tensors, tmp_path / model / "model.safetensors")
        (tmp_path / model / "config.json").write_text(
            json.dumps({"model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": 5})
        )
    return tmp_path


def tensors(folder, name):
    return load_file(folder / name / "model.safetensors")


def merged(folder, text, **options):
    (folder / "recipe.yaml").write_text(text)
    merge_recipe(folder / "recipe.yaml", folder / "out", overwrite=True, **options)
    return tensors(folder, "out")


def test_rules_merge_some_tensors_otherwise(folder):
    got = merged(
        folder,
        """
method: average
base: base
experts: [ft0, ft1, ft2]
rules:
  - {tensors: "*.self_attn.*", method: slerp, parameters: {t: 0.3}, experts: [2, 0]}
  - {tensors: [lm_head.weight, "*.norm.*"], method: task-arithmetic, parameters: {scale: 0.5}, weights: [1, 0, -1]}
""",
    )
    base, *experts = (tensors(folder, name) for name in ("base", "ft0", "ft1", "ft2"))
    arcs = merge_state_dicts(gratis.SLERP(t=0.3), [experts[2], experts[0]])
    plain = merge_state_dicts(gratis.Average(), experts)
    for name, tensor in got.items():
        if "self_attn" in name:
            expected = arcs[name]
        elif name == "lm_head.weight" or "norm" in name:
            expected = base[name] + 0.5 * (experts[0][name] - base[name]) - 0.5 * (experts[2][name] - base[name])
        else:
            expected = plain[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_a_recipe_with_rules_survives_its_file(folder):
    text = "method: ties\nparameters: {density: 0.4}\nbase: base\nexperts: [ft0, {path: ft1, weight: 0.2}]\n"
    text += 'rules:\n- {tensors: ["*mlp*"], parameters: {density: 0.9}, weights: [1, 3]}\n'
    (folder / "one.yaml").write_text(text)
    one = load_recipe(folder / "one.yaml")
    one.save(folder / "two.yaml")
    two = load_recipe(folder / "two.yaml")
    assert one.rules == two.rules == (Rule(("*mlp*",), gratis.TIES(density=0.9), (1.0, 3.0), None),)
    assert (one.method, one.weights, one.experts, one.base) == (two.method, two.weights, two.experts, two.base)


def test_parameters_of_single_experts(folder):
    base, *experts = (tensors(folder, name) for name in ("base", "ft0", "ft1"))
    each = (gratis.TIES(density=0.2, scope="tensor"), gratis.TIES(density=1.0, scope="tensor"))
    got = merge_state_dicts(each[0], experts, base, rules=[Rule(("*",), each[0], each=each)])
    name = "lm_head.weight"
    small, whole = (expert[name] - base[name] for expert in experts)
    least = small.abs().flatten().sort(descending=True).values[int(0.2 * small.numel()) - 1]
    small = small * (small.abs() >= least)
    sign = torch.where(small + whole >= 0, 1.0, -1.0)
    agreeing = [d * (d.sign() == sign) for d in (small, whole)]
    count = sum((d != 0).float() for d in agreeing).clamp_min(1)
    torch.testing.assert_close(got[name], base[name] + sum(agreeing) / count, rtol=0, atol=1e-6)


def test_a_rule_without_tensors_warns(folder):
    with pytest.warns(GratisWarning, match="does nothing"):
        merged(folder, "method: average\nexperts: [ft0, ft1]\nrules: [{tensors: nothing.*, weights: [1, 2]}]\n")


def test_slerp_along_layers_and_filters(folder):
    got = merged(
        folder,
        """
slices:
  - sources: [{model: base, layer_range: [0, 4]}, {model: ft0, layer_range: [0, 4]}]
merge_method: slerp
base_model: base
parameters:
  t: [{filter: self_attn, value: [0, 0.6, 1]}, {filter: mlp, value: 0.25}, {value: 0.5}]
""",
    )
    a, b = tensors(folder, "base"), tensors(folder, "ft0")

    def arc(name, t):
        one, two = a[name].double(), b[name].double()
        angle = torch.acos((one * two).sum() / (one.norm() * two.norm()))
        return (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle)

    # The gradient [0, 0.6, 1] over four layers: 0, 0.4, 0.6 + a third of the way to 1, 1.
    for layer, t in enumerate((0.0, 0.4, 0.6 + 0.4 / 3, 1.0)):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        torch.testing.assert_close(got[name].double(), arc(name, t), rtol=0, atol=1e-5)
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(got[name].double(), arc(name, 0.25), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        got["model.norm.weight"].double(), arc("model.norm.weight", 0.5), rtol=0, atol=1e-5
    )  # fmt: skip


def test_the_model_s_setting_comes_before_the_file_s(folder):
    got = merged(
        folder,
        """
models:
  - {model: ft0, parameters: {weight: [{filter: mlp, value: 3}]}}
  - {model: ft1}
merge_method: linear
parameters: {weight: 1}
dtype: bfloat16
""",
    )
    a, b = tensors(folder, "ft0"), tensors(folder, "ft1")
    for name, tensor in got.items():
        share = 0.75 if "mlp" in name else 0.5
        assert torch.equal(tensor, (share * a[name] + (1 - share) * b[name]).bfloat16())


def test_ties_divides_by_weights_or_adds_up(folder):
    text = "models:\n- {model: base}\n- {model: ft0, parameters: {weight: 0.7, density: 1}}\n"
    text += (
        "- {model: ft1, parameters: {weight: 0.2}}\nmerge_method: ties\nbase_model: base\nparameters: {normalize: %s}\n"
    )
    base, a, b = (tensors(folder, name) for name in ("base", "ft0", "ft1"))
    for normalize in ("true", "false"):
        got = merged(folder, text % normalize)
        for name in got:
            deltas = torch.stack([0.7 * (a[name] - base[name]), 0.2 * (b[name] - base[name])])
            agree = (deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)).float()
            total = (deltas * agree).sum(0)
            if normalize == "true":
                total = total / (torch.tensor([0.7, 0.2]).view(2, 1, 1) * agree).sum(0)
            torch.testing.assert_close(got[name], base[name] + total, rtol=0, atol=1e-6)


def test_slices_stack_layers_of_several_models(folder):
    got = merged(
        folder,
        """
slices:
  - sources: [{model: ft0, layer_range: [0, 3]}]
  - sources: [{model: ft1, layer_range: [1, 4], parameters: {scale: [{filter: mlp, value: 0.5}, {value: 1}]}}]
merge_method: passthrough
""",
    )
    a, b = tensors(folder, "ft0"), tensors(folder, "ft1")
    assert json.loads((folder / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    assert len(got) == 3 + 2 * 6
    for layer in range(6):
        source, own = (a, layer) if layer < 3 else (b, layer - 2)
        for part, scale in (("self_attn.q_proj", 1.0), ("mlp.up_proj", 1.0 if layer < 3 else 0.5)):
            assert torch.equal(
                got[f"model.layers.{layer}.{part}.weight"], scale * source[f"model.layers.{own}.{part}.weight"]
            )  # fmt: skip
    assert torch.equal(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(got["lm_head.weight"], b["lm_head.weight"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: tise\nmodels: [{model: ft0}]", "'tise' has no counterpart; did you mean 'ties'"),
        ("merge_method: linear\nmodels: [{model: ft0}]\ntokenizer: {tokens: {}}", "'tokens' of tokenizer is not"),
        ("merge_method: linear\nmodels: [{model: ft0}]\ntokenizer_source: ft1", "base or union, not 'ft1'"),
        ("merge_method: linear\nmodels: [{model: ft0}]\ntokenizer: {source: [a]}", "base or union, not"),
        ("merge_method: linear\nmodels: [{model: ft0}]\ntokenizer_source: base\ntokenizer: {source: base}", "twice"),
        ("method: average\nexperts: [ft0, ft1]\ntokenizer: onion", "not 'onion'; did you mean 'union'"),
        (
            "merge_method: della\nbase_model: base\nmodels: [{model: ft0}]\nparameters: {weight: 1, density: 0.9}",
            "spread",
        ),
        (
            "merge_method: breadcrumbs\nbase_model: base\nmodels: [{model: ft0}]\nparameters: {weight: 1, rescale: true}",
            "rescale: true is not supported",
        ),
        ("merge_method: sce\nmodels: [{model: ft0}]", "sce needs a base_model"),
        ("merge_method: ram\nbase_model: base\nmodels: [{model: ft0}]\nparameters: {epsilon: 1}", "1e-5 here"),
        (
            "merge_method: arcee_fusion\nbase_model: base\nmodels: [{model: ft0}, {model: ft1}]",
            "arcee_fusion needs two",
        ),
        ("merge_method: multislerp\nbase_model: base\nmodels: [{model: ft0}]", "leave base_model out"),
        ("merge_method: linear\nmodels: [{model: ft0}]\nchat_template: x", "'chat_template' is not supported"),
        ("merge_method: linear\nmodels: [{model: ft0}]\nparametres: {}", "did you mean 'parameters'"),
        ("merge_method: linear\nmodels: [{model: ft0}]", "linear needs weight|needs weight"),
        ("merge_method: linear\nmodels: [{model: ft0, wieght: 3}]", "unknown key 'wieght'"),
        ("merge_method: linear\nmodels: [{model: ft0@main}]", "revisions are not read"),
        ("merge_method: linear\nmodels: [{model: ft0+lora}]", "There is no checkpoint"),
        ("merge_method: linear\nmodules: {}", "'modules' is not supported"),
        ("merge_method: ties\nmodels: [{model: ft0, parameters: {weight: 1}}]", "needs a base_model"),
        ("merge_method: slerp\nbase_model: base\nmodels: [{model: ft0}]\nparameters: {t: 0.5}", "slerp needs two"),
        ("merge_method: linear\nparameters: {weight: heavy}\nmodels: [{model: ft0}]", "weight must be a number"),
        ("merge_method: linear\nmodels: [{model: ft0}]\nslices: [{sources: []}]", "either models or slices"),
        ("merge_method: passthrough\nslices: [{sources: [{model: ft0, layer_range: [0, 9]}]}]", "not within the 4"),
        ("merge_method: linear\nmodels: [{model: ft0}]\ndtype: int3", "dtype must be"),
    ],
)
def test_what_cannot_be_followed_is_named(folder, text, message):
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(FileError, match=message) as caught:
        merge_recipe(folder / "recipe.yaml", folder / "out")
    assert str(caught.value).endswith(".")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("form", ["method: average\nexperts: [%s, ft1]", "merge_method: linear\nmodels: [{model: %s}]"])
def test_a_recipe_names_nothing_outside_its_folder(folder, form, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "ft0").rename(elsewhere / "ft0")
    (folder / "link").symlink_to(elsewhere / "ft0")
    for name in (str(elsewhere / "ft0"), f"../{elsewhere.name}/ft0", "link"):
        (folder / "recipe.yaml").write_text(form % name)
        with pytest.raises(FileError, match="outside its folder"):
            load_recipe(folder / "recipe.yaml")
    (folder / "recipe.yaml").write_text("method: average\nexperts: [ft0, ft1]")
    merge_recipe(folder / "recipe.yaml", folder / "out", models=[elsewhere])
    got = tensors(folder, "out")["lm_head.weight"]
    mean = (
        load_file(elsewhere / "ft0" / "model.safetensors")["lm_head.weight"] + tensors(folder, "ft1")["lm_head.weight"]
    ) / 2
    torch.testing.assert_close(got, mean)


def test_a_few_lines_do_not_become_gigabytes(folder):
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(9)]
    (folder / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(FileError, match="too many values"):
        load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{tensors: a, wieghts: [1]}", "did you mean 'weights'"),
        ("{weights: [1, 2]}", "tensors must be named"),
        ("{tensors: [3]}", "are names"),
        ("{tensors: a, experts: [ft0]}", "their places"),
        ("{tensors: a, weights: [x, y]}", "must be a number"),
    ],
)
def test_bad_rules(folder, rule, message):
    (folder / "recipe.yaml").write_text(f"method: average\nexperts: [ft0, ft1]\nrules: [{rule}]\n")
    with pytest.raises(FileError, match=message):
        load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize("rule", ["{tensors: '*', experts: [5]}", "{tensors: '*', experts: [0, 0]}"])
def test_rules_that_name_experts_that_are_not_there(folder, rule):
    with pytest.raises(InputError, match="A rule names experts"):
        merged(folder, f"method: average\nexperts: [ft0, ft1]\nrules: [{rule}]\n")
    assert not (folder / "out").exists()


PARAMETERS = """
merge_method: %s
base_model: base
models:
- {model: base}
- {model: ft0, parameters: {weight: 0.7, density: 0.6, gamma: 0.1, epsilon: 0.2}}
- {model: ft1, parameters: {weight: 0.2, density: 0.5}}
parameters: {lambda: 0.8, normalize: %s}
"""


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("name", "kind", "first", "second", "signs"),
    [
        ("breadcrumbs", gratis.Breadcrumbs, {"outliers": 0.1}, {"outliers": 0.01}, False),
        ("breadcrumbs_ties", gratis.BreadcrumbsTIES, {"outliers": 0.1}, {"outliers": 0.01}, True),
        ("della", gratis.DELLA, {"spread": 0.2}, {"spread": 0.15}, True),
        ("della_linear", gratis.DELLALinear, {"spread": 0.2}, {"spread": 0.15}, False),
    ],
)
def test_sparsified_task_vectors_have_the_parameters_of_each_model(folder, name, kind, first, second, signs, normalize):
    (folder / "recipe.yaml").write_text(PARAMETERS % (name, str(normalize).lower()))
    recipe = load_recipe(folder / "recipe.yaml")
    shared = {"scale": 0.8}
    if signs:
        shared["divisor"] = "weight" if normalize else "none"
    each = (kind(density=0.6, **first, **shared), kind(density=0.5, **second, **shared))
    total = 0.9 if normalize and not signs else 1.0
    (rule,) = recipe.rules
    assert rule.each == each
    assert rule.weights == pytest.approx((0.7 / total, 0.2 / total))
    assert recipe.base == folder / "base"
    recipe.run(folder / "out")
    base, *experts = (tensors(folder, model) for model in ("base", "ft0", "ft1"))
    expected = merge_state_dicts(each[0], experts, base, rule.weights, rules=[Rule(("*",), each[0], each=each)])
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors(folder, "out").items())


def test_the_share_that_is_kept_comes_before_the_share_of_outliers(folder):
    text = "merge_method: breadcrumbs\nbase_model: base\nmodels: [{model: ft0}]\n"
    (folder / "recipe.yaml").write_text(text + "parameters: {weight: 1, density: 0.9, gamma: 0.3}\n")
    assert load_recipe(folder / "recipe.yaml").method.outliers == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "method", "models", "needs_base"),
    [
        ("sce\nbase_model: base\nparameters: {select_topk: 0.3}", gratis.SCE(density=0.3), "ft0 ft1", True),
        ("ram\nbase_model: base", gratis.RAM(), "ft0 ft1", True),
        ("arcee_fusion\nbase_model: base", gratis.ArceeFusion(), "ft0", True),
        (
            "karcher\nparameters: {max_iter: 4, tol: 1e-3}",
            gratis.Karcher(iterations=4, tolerance=1e-3),
            "ft0 ft1",
            False,
        ),
        ("multislerp\nparameters: {weight: 2}", gratis.MultiSLERP(), "ft0 ft1", False),
    ],
)
def test_methods_without_weights_or_on_the_sphere(folder, text, method, models, needs_base):
    listed = "".join(f"- {{model: {name}}}\n" for name in [*(["base"] if needs_base else []), *models.split()])
    (folder / "recipe.yaml").write_text(f"merge_method: {text}\nmodels:\n{listed}")
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.method == method
    recipe.run(folder / "out")
    experts = [tensors(folder, name) for name in models.split()]
    expected = merge_state_dicts(method, experts, tensors(folder, "base") if needs_base else None)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(folder, "out").items())


def with_tokenizer(folder, name, tokens):
    """Give a model a tokenizer with these tokens, in this order."""
    content = {"model": {"type": "WordLevel", "unk_token": tokens[0], "vocab": {t: n for n, t in enumerate(tokens)}}}
    content |= {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    content |= {"truncation": None, "padding": None, "post_processor": None}
    (folder / name / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / name / "config.json").read_text())
    (folder / name / "config.json").write_text(json.dumps({**config, "vocab_size": 6}))
    given = load_file(folder / name / "model.safetensors")
    for key in [key for key in given if "layers" in key]:
        given[key] = given[key][:4].contiguous()
    save_file(given, folder / name / "model.safetensors")


@pytest.mark.parametrize("policy", ["base", "union", "intersect"])
def test_a_recipe_says_what_becomes_of_different_vocabularies(folder, policy):
    with_tokenizer(folder, "ft0", list("abcdef"))
    with_tokenizer(folder, "ft1", list("gedcba"))
    (folder / "recipe.yaml").write_text("method: average\nexperts: [ft0, ft1]\n")
    with pytest.raises(InputError, match="different tokenizers"):
        load_recipe(folder / "recipe.yaml").run(folder / "out")
    (folder / "recipe.yaml").write_text(f"method: average\nexperts: [ft0, ft1]\ntokenizer: {policy}\n")
    recipe = load_recipe(folder / "recipe.yaml")
    recipe.save(folder / "again.yaml")
    assert load_recipe(folder / "again.yaml").tokenizer == policy
    recipe.run(folder / "out")
    merge(gratis.Average(), experts=[folder / "ft0", folder / "ft1"], out=folder / "direct", tokenizer=policy)
    direct = tensors(folder, "direct")
    assert all(torch.equal(tensor, direct[name]) for name, tensor in tensors(folder, "out").items())
    rows = {"base": 6, "union": 7, "intersect": 5}[policy]
    assert len(direct["lm_head.weight"]) == rows
    assert json.loads((folder / "out" / "merge.json").read_text())["recipe"]["tokenizer"] == policy


@pytest.mark.parametrize(
    ("said", "policy"),
    [
        ("tokenizer_source: union", "union"),
        ("tokenizer: {source: union}", "union"),
        ("tokenizer_source: base", "base"),
        ("tokenizer: {source: ft0}", "base"),
        ("tokenizer: {}", "error"),
        ("tokenizer_source:", "error"),
    ],
)
def test_mergekit_s_tokenizer_is_a_policy(folder, said, policy):
    text = "merge_method: linear\nbase_model: ft0\nmodels: [{model: ft0}, {model: ft1}]\nparameters: {weight: 1}\n"
    (folder / "recipe.yaml").write_text(text + said)
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.tokenizer == policy
    assert (recipe.base is not None) == (policy != "error")


def add_adapter(folder, name):
    """A LoRA adapter of the fixture's models; returns what it adds to the first query projection."""
    (folder / name).mkdir()
    generator = torch.Generator().manual_seed(len(name))
    down, up = torch.randn(2, 5, generator=generator), torch.randn(6, 2, generator=generator)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, folder / name / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / name / "adapter_config.json").write_text(json.dumps(settings))
    return 2 * up @ down


@pytest.mark.parametrize(
    "text",
    [
        "method: average\nexperts: [ft0+lora, ft1]\n",
        "merge_method: linear\nmodels: [{model: ft0+lora}, {model: ft1}]\nparameters: {weight: 1}\n",
    ],
)
def test_an_adapter_belongs_to_the_model_before_it(folder, text):
    added = add_adapter(folder, "lora")
    got = merged(folder, text)
    one, two = tensors(folder, "ft0"), tensors(folder, "ft1")
    for name, tensor in got.items():
        change = added if name == "model.layers.0.self_attn.q_proj.weight" else 0
        torch.testing.assert_close(tensor, (one[name] + change + two[name]) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "method: average\nbase: base\nexperts: [lora, ft1]\n",
        "merge_method: linear\nbase_model: base\nmodels: [{model: lora}, {model: ft1}]\nparameters: {weight: 1}\n",
    ],
)
def test_an_adapter_alone_belongs_to_the_base(folder, text):
    added = add_adapter(folder, "lora")
    got = merged(folder, text)
    base, two = tensors(folder, "base"), tensors(folder, "ft1")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(got[name], (base[name] + added + two[name]) / 2, rtol=0, atol=1e-5)


def test_neither_part_of_an_adapter_s_name_leads_out(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    add_adapter(elsewhere, "lora")
    (folder / "recipe.yaml").write_text(f"method: average\nexperts: [ft0+../{elsewhere.name}/lora, ft1]\n")
    with pytest.raises(FileError, match="outside its folder"):
        load_recipe(folder / "recipe.yaml")


# What mergekit 0.1.5 says of its own methods: whether sums are normalised, and whether what is left is rescaled.
DEFAULTS = {
    "task_arithmetic": (False, False), "ties": (True, False), "dare_ties": (False, True), "dare_linear": (False, True),
    "breadcrumbs": (False, False), "breadcrumbs_ties": (False, False), "della": (True, True),
    "della_linear": (False, True),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_left_out_means_what_it_means_to_mergekit(folder, name):
    normalize, rescale = DEFAULTS[name]
    models = "models: [{model: ft0, parameters: {weight: 0.4, density: 0.6}}, {model: ft1, parameters: {weight: 0.3, density: 0.6}}]"
    text = f"merge_method: {name}\nbase_model: base\n{models}\n"
    said = f"parameters: {{normalize: {str(normalize).lower()}, rescale: {str(rescale).lower()}, lambda: 1.0}}\n"
    if name == "task_arithmetic":
        said = said.replace("rescale: false, ", "")

    def read(text):
        (folder / "recipe.yaml").write_text(text)
        recipe = load_recipe(folder / "recipe.yaml")
        return recipe.method, recipe.weights, recipe.rules

    assert read(text) == read(text + said)
    assert read(text) != read(
        text + said.replace(f"normalize: {str(normalize).lower()}", f"normalize: {str(not normalize).lower()}")
    )
