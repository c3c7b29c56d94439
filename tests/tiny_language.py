"""A tiny random language model of a standard class, and what the contract tests compare about it."""

from __future__ import annotations

import hashlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, VOCABULARY, PROMPT, NEW = 4, 97, 40, 24


def tiny_language_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A 4-layer Llama with grouped-query attention; weights large enough that its outputs differ by token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(dtype)
    model.generation_config.pad_token_id = 0
    return model


def prompt(batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Token ids (batch, PROMPT)."""
    return torch.randint(2, VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(seed))


def run(model: LlamaForCausalLM, ids: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """Tokens of the model's own generate and the logits of a forward pass, flattened per row: (batch, numbers)."""
    ids = prompt() if ids is None else ids
    torch.manual_seed(seed)
    with torch.no_grad():
        tokens = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=True
        )
        logits = model(tokens[:, : PROMPT + NEW]).logits[:, -1]
    return torch.cat([tokens.double(), logits.double()], dim=1)


def snapshot(model: torch.nn.Module) -> dict:
    """Everything that a method could leave behind: weights, config, hooks, attributes of every module."""
    weights = {
        name: hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }
    modules = {}
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in {"_parameters", "_buffers", "_modules"}}
        modules[name] = {
            "attributes": sorted(own),
            "identities": {k: id(v) for k, v in own.items() if callable(v)},
            "hooks": {k: len(v) for k, v in own.items() if "hook" in k and hasattr(v, "__len__")},
            "parameters": {k: (id(v), v.data_ptr() if v is not None else 0) for k, v in module._parameters.items()},
            "buffers": {k: id(v) for k, v in module._buffers.items()},
            "training": module.training,
        }
    config = model.config.to_dict() if hasattr(model, "config") else {}
    return {
        "weights": weights,
        "modules": modules,
        "config": repr(sorted(config.items(), key=str)),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "generation": repr(model.generation_config.to_dict()) if hasattr(model, "generation_config") else "",
    }
