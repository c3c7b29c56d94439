"""The same mergekit files through gratis and through mergekit: largest difference of any weight.

    python benchmarks/mergekit_recipes.py [--mergekit PYTHON]

PYTHON is that of an environment with mergekit; without it one is made. Three small Llama models fine-tuned (at random)
from a fourth; the files are mergekit's examples with these names.
Random dropping is compared by its moments, as the draws differ. Writes benchmarks/results/mergekit_recipes.json.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from measuring import peer_python, run_apart, store
from rich.progress import track
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from gratis.subjects.merging import merge_recipe

THREE = "models:\n  - {model: base}\n" + "".join(
    f"  - {{model: ft{n}, parameters: {{weight: {w}, density: {d}}}}}\n"
    for n, w, d in ((0, 0.4, 0.5), (1, 0.3, 0.7), (2, 0.3, 1.0))
)
DROPPED = THREE.replace("density: 1.0", "density: 0.8")
RECIPES = {
    "linear": "merge_method: linear\ndtype: float32\nmodels:\n"
    + "".join(f"  - {{model: ft{n}, parameters: {{weight: {w}}}}}\n" for n, w in ((0, 1.0), (1, 0.3), (2, 0.5))),
    "linear, not normalised": "merge_method: linear\ndtype: float32\nparameters: {normalize: false}\nmodels:\n"
    + "".join(f"  - {{model: ft{n}, parameters: {{weight: {w}}}}}\n" for n, w in ((0, 0.9), (1, 0.3))),
    "task arithmetic": f"merge_method: task_arithmetic\nbase_model: base\ndtype: float32\nparameters: {{lambda: 0.7}}\n{THREE}",
    "ties, gradients and filters": """
models:
  - {model: ft0, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: ft1, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
  - model: ft2
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {value: 0}]
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "ties, not normalised": f"merge_method: ties\nbase_model: base\ndtype: float32\nparameters: {{normalize: false}}\n{THREE}",
    "slerp, gradients and filters": """
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: ft0, layer_range: [0, 4]}
merge_method: slerp
base_model: base
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float32
""",
    "nuslerp": "merge_method: nuslerp\ndtype: float32\nmodels:\n  - {model: ft0, parameters: {weight: 0.7}}\n"
    "  - {model: ft1, parameters: {weight: 0.5}}\n",
    "model stock": "merge_method: model_stock\nbase_model: base\ndtype: float32\n"
    "models: [{model: ft0}, {model: ft1}, {model: ft2}]\n",
    "nearswap": "merge_method: nearswap\nbase_model: base\ndtype: float32\nparameters: {t: 0.01}\n"
    "models: [{model: base}, {model: ft0}]\n",
    "passthrough slices": """
slices:
  - sources: [{model: ft0, layer_range: [0, 3]}]
  - sources: [{model: ft1, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1.0}]}}]
merge_method: passthrough
dtype: float32
""",
    "linear slices": """
slices:
  - sources:
      - {model: ft0, layer_range: [0, 2], parameters: {weight: 0.5}}
      - {model: ft1, layer_range: [1, 3], parameters: {weight: 0.25}}
  - sources: [{model: ft2, layer_range: [2, 4], parameters: {weight: 1.0}}]
merge_method: linear
dtype: float32
""",
    "output in bfloat16": f"merge_method: task_arithmetic\nbase_model: base\ndtype: float32\nout_dtype: bfloat16\n{THREE}",
    "breadcrumbs": f"merge_method: breadcrumbs\nbase_model: base\ndtype: float32\nparameters: {{gamma: 0.05}}\n{THREE}",
    "breadcrumbs ties": f"merge_method: breadcrumbs_ties\nbase_model: base\ndtype: float32\n{THREE}",
    "sce": "merge_method: sce\nbase_model: base\ndtype: float32\nparameters: {select_topk: 0.6}\n"
    "models: [{model: ft0}, {model: ft1}, {model: ft2}]\n",
    "ram": "merge_method: ram\nbase_model: base\ndtype: float32\nmodels: [{model: ft0}, {model: ft1}]\n",
    "karcher": "merge_method: karcher\ndtype: float32\nmodels: [{model: ft0}, {model: ft1}, {model: ft2}]\n",
    "multislerp": "merge_method: multislerp\ndtype: float32\nmodels:\n  - {model: ft0, parameters: {weight: 0.7}}\n"
    "  - {model: ft1, parameters: {weight: 0.3}}\n",
    "arcee fusion": "merge_method: arcee_fusion\nbase_model: base\ndtype: float32\nmodels: [{model: base}, {model: ft0}]\n",
    "della (moments)": f"merge_method: della\nbase_model: base\ndtype: float32\nparameters: {{epsilon: 0.1}}\n{DROPPED}",
    "della linear (moments)": "merge_method: della_linear\nbase_model: base\ndtype: float32\nparameters: {epsilon: 0.1}\n"
    + DROPPED,
    "dare linear (moments)": f"merge_method: dare_linear\nbase_model: base\ndtype: float32\n{THREE}",
    "dare ties (moments)": f"merge_method: dare_ties\nbase_model: base\ndtype: float32\n{THREE}",
}  # fmt: skip


def models(folder: Path) -> None:
    """Four folders of one tiny architecture: base, and three with changes of a tenth of its spread."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    for n in range(3):
        tuned = LlamaForCausalLM(config)
        with torch.no_grad():
            for weight, other in zip(base.parameters(), tuned.parameters(), strict=True):
                other.copy_(weight + 0.002 * torch.randn_like(weight))
        tuned.save_pretrained(folder / f"ft{n}")


def compared(title: str, ours: Path, theirs: Path, base: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One row: how far the two outputs are apart."""
    a, b = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    if a.keys() != b.keys() or any(a[key].dtype != b[key].dtype for key in a):
        raise SystemExit(f"{title}: the outputs have different tensors")
    if "moments" in title:
        moments = {"mean size": lambda t: t.abs().mean(), "spread": lambda t: t.std()}
        row: dict[str, Any] = {"file": title, "tensors": len(a)}
        for what, moment in moments.items():
            ratios = [
                float(moment(b[k].float() - base[k]) / moment(a[k].float() - base[k])) for k in a if a[k].ndim == 2
            ]
            row[f"{what}, ours / theirs"] = [round(min(ratios), 3), round(max(ratios), 3)]
        return row
    difference = max(float((a[key].float() - b[key].float()).abs().max()) for key in a)
    same = [key for key in a if key in base and base[key].shape == a[key].shape]
    change = max(float((a[key].float() - base[key]).abs().max()) for key in same)
    return {
        "file": title, "tensors": len(a), "largest difference": float(f"{difference:.1e}"),
        "relative to the change": float(f"{difference / change:.1e}"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", type=Path, default=None)
    wish = parser.parse_args()
    peer = wish.mergekit or peer_python("mergekit", "mergekit==0.1.5", "transformers==5.23.0")
    script = Path(__file__).parent.absolute() / "measuring" / "mergekit_run.py"
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models(folder)
        for number, text in enumerate(RECIPES.values()):
            (folder / f"{number}.yaml").write_text(text)
        refused = run_apart(peer.absolute(), script, folder)
        base = load_file(folder / "base" / "model.safetensors")
        for number, title in enumerate(track(RECIPES, description="the same files")):
            if str(number) in refused:
                rows.append({"file": title, "mergekit refuses": refused[str(number)]})
                continue
            merge_recipe(folder / f"{number}.yaml", folder / f"ours{number}")
            rows.append(compared(title, folder / f"ours{number}", folder / f"theirs{number}", base))
    store("mergekit_recipes", {"repeat": "python benchmarks/mergekit_recipes.py", "the same files": rows})


if __name__ == "__main__":
    main()
