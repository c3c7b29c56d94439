"""Adapters merged in by gratis and by PEFT: largest difference of any weight.

    python benchmarks/adapters.py

A small Llama and adapters of every kind with random numbers, which PEFT makes, saves and merges in an environment of its
own. Writes benchmarks/results/adapters.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from measuring import peer_python, run_apart, store
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from gratis.subjects.adapters import AdaptedCheckpoint
from gratis.subjects.checkpoints import Checkpoint


def base_model(folder: Path) -> None:
    """A Llama of four narrow layers whose head is a table of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    rows = []
    python = peer_python("mergekit", "mergekit==0.1.5", "transformers==5.23.0")
    with tempfile.TemporaryDirectory() as name:
        base, out = Path(name) / "base", Path(name) / "out"
        base_model(base)
        script = Path(__file__).parent / "measuring" / "peft_once.py"
        for kind in run_apart(python, script, base, out)["kinds"]:
            theirs = load_file(out / kind / "merged" / "model.safetensors")
            plain = Checkpoint(base)
            ours = AdaptedCheckpoint(plain, out / kind / "adapter")
            apart = [(ours.view(weight).view_as(theirs[weight]) - theirs[weight]).abs().max() for weight in theirs]
            changed = sum(
                not torch.equal(plain.view(w).view_as(theirs[w]), theirs[w]) for w in theirs if w in plain.places
            )
            rows.append({"adapter": kind, "tensors changed": changed, "largest difference": float(max(apart))})
    store("adapters", {"repeat": "python benchmarks/adapters.py", "PEFT and gratis": rows})


if __name__ == "__main__":
    main()
