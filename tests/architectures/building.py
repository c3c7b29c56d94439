"""Tiny random models of every causal language model that the installed transformers has, by one configuration."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch

VOCABULARY, WINDOW, LARGEST = 97, 256, 2_000_000

GENERIC: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    # Mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_topk": 2,
    # Latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # Other families' words for the same sizes
    "ffn_dim": 48,
    "d_model": 32,
    "embed_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "n_positions": WINDOW,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "rotary_dim": 8,
    "is_decoder": True,
}
"""Passed where a configuration class knows the name."""

_LATENT = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_RECURRENT_AND_FULL = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

PARTICULAR: dict[str, dict[str, Any]] = {
    **{
        name: _LATENT
        for name in (
            "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite",
            "glm_moe_dsa", "minicpm3", "youtu",
        )
    },
    **{
        name: _RECURRENT_AND_FULL
        for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "olmo_hybrid")
    },
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_group_size": 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cpmant": {"dim_ff": 48, "dim_head": 8},
    "dbrx": {
        "n_heads": 4, "n_layers": 2, "max_seq_len": WINDOW,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 1, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 8, "activation_sparsity_pattern": None,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2, "expert_ffn_hidden_size": 16, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 16},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False, "concat_input": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "n_mamba_heads": 2, "mamba_d_state": 8, "use_mamba_kernels": False,
        "layers_block_type": ["mamba", "hybrid"], "attention_head_dim": 16, "mamba_dt_rank": 4,
    },
    "zamba2": {
        "n_mamba_heads": 8, "mamba_d_state": 8, "mamba_headdim": 8, "use_mamba_kernels": False,
        "layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What the generic values do not suffice for."""


def architectures() -> list[str]:
    """Names of all model types with a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def configuration(name: str, **changes: Any) -> Any:
    """A tiny configuration of the model type `name`."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[name](**{**_values(CONFIG_MAPPING[name]), **PARTICULAR.get(name, {}), **changes})


def _values(kind: Any) -> dict[str, Any]:
    known = set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    known |= {field for base in kind.__mro__ for field in getattr(base, "__annotations__", {})}
    values = {field: value for field, value in GENERIC.items() if field in known}
    for field, part in kind.sub_configs.items():
        if isinstance(part, type) and "text" in field:
            values[field] = {**_values(part), **PARTICULAR.get(part.model_type, {})}
    return values


class TooLargeError(Exception):
    """The generic values do not make this model tiny."""


def build(name: str, **changes: Any) -> Any:
    """A tiny random model of the type `name`, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            numbers = sum(
                p.numel() for p in AutoModelForCausalLM.from_config(configuration(name, **changes)).parameters()
            )
        if numbers > LARGEST:
            raise TooLargeError(f"{numbers / 1e6:,.0f} million parameters with the generic values")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configuration(name, **changes)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
