"""Adapters of every kind with random numbers, and what PEFT makes of them: run in an environment that has PEFT.

python peft_once.py BASE OUT. Writes OUT/KIND/adapter and OUT/KIND/merged, and prints the kinds as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

BASE, OUT = Path(sys.argv[1]), Path(sys.argv[2])
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "two modules": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"r": 8, "lora_alpha": 4, "target_modules": EVERY},
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "target_modules": EVERY, "use_rslora": True},
    "weight-decomposed (DoRA)": {"r": 4, "lora_alpha": 8, "target_modules": EVERY, "use_dora": True},
    "ranks and alphas by pattern": {
        "r": 4, "lora_alpha": 8, "target_modules": EVERY, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"k_proj": 16},
    },
    "embeddings too": {"r": 4, "lora_alpha": 8, "target_modules": [*EVERY, "embed_tokens"]},
    "a head saved whole": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "some layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "the model's biases too": {"r": 4, "lora_alpha": 8, "target_modules": EVERY, "bias": "all"},
    "bias of the product": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "lora_bias": True},
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    for number, (kind, settings) in enumerate(KINDS.items()):
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        generator = torch.Generator().manual_seed(number)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
        adapted.save_pretrained(OUT / kind / "adapter")
        adapted.merge_and_unload().save_pretrained(OUT / kind / "merged")
    print(json.dumps({"kinds": list(KINDS)}))


main()
