"""A tiny random masked-diffusion language model of a standard class, and stand-ins for the remote classes."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertForMaskedLM

from gratis.subjects.masked_diffusion_door import generate

VOCABULARY, MASK, PROMPT, NEW = 61, 4, 9, 16


def tiny_masked_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> ModernBertForMaskedLM:
    """Two layers, full attention; weights large enough that outputs differ by place and token."""
    torch.manual_seed(seed)
    config = ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, layer_types=["full_attention"] * 2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2, initializer_range=0.3, initializer_cutoff_factor=3.0,
    )  # fmt: skip
    config.mask_token_id = MASK
    return ModernBertForMaskedLM(config).eval().to(dtype)


def prompt(batch: int = 1, seed: int = 1, length: int = PROMPT) -> Tensor:
    """Token ids (batch, length) without special tokens."""
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, ids: Tensor | None = None, seed: int = 0) -> Tensor:
    """Tokens of the model's generate and the logits of a forward pass, flattened per row: (batch, numbers)."""
    ids = prompt() if ids is None else ids
    torch.manual_seed(seed)
    with torch.no_grad():
        tokens = generate(model, ids, max_new_tokens=NEW)
        logits = model(input_ids=tokens).logits[:, -1]
    return torch.cat([tokens.double(), logits.double()], dim=1)


class Scripted(nn.Module):
    """Logits by script: `script(ids)` gives (batch, length, vocabulary). Later tokens change earlier logits a little."""

    def __init__(self, script, mask: int = MASK) -> None:
        super().__init__()
        self.script, self.passes = script, 0
        self.config = SimpleNamespace(mask_token_id=mask, model_type="scripted")

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.passes += 1
        seen = (input_ids.double() + 1).cos().sum(-1)[:, None] * 0.5
        logits = self.script(input_ids).clone()
        logits[..., 0] = logits[..., 0] + seen - 50
        return SimpleNamespace(logits=logits)


class LLaDAStyle(nn.Module):
    """The call signature of LLaDA's remote class: `forward(input_ids, …)`, a mask token in the configuration."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.model = inner or tiny_masked_model()
        self.config = SimpleNamespace(mask_token_id=MASK, model_type="llada", eos_token_id=2, pad_token_id=0)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(
        self, input_ids=None, inputs_embeds=None, attention_mask=None, attention_bias=None, past_key_values=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
        cache_position=None,
    ):  # fmt: skip
        return self.model(input_ids=input_ids)


class DreamStyle(LLaDAStyle):
    """The call signatures of Dream's remote class: outputs are shifted by one, and it has a loop of its own."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__(inner)
        self.config.model_type = "Dream"
        self.generation_config = SimpleNamespace(steps=8, eps=1e-3, alg="entropy", mask_token_id=MASK)
        self.passes = 0

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
        cache_position=None, num_logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        self.passes += 1
        logits = self.model(input_ids=input_ids).logits
        # What its training left it with: output j speaks of place j + 1.
        return SimpleNamespace(logits=torch.cat([logits[:, 1:], logits[:, :1]], dim=1))

    @torch.no_grad()
    def diffusion_generate(self, inputs=None, generation_config=None, **kwargs):
        """Greedy, by entropy, along reversed times, with the two functions that a caller may hand in."""
        tokens_hook = kwargs.pop("generation_tokens_hook_func", lambda step, x, logits: x)
        logits_hook = kwargs.pop("generation_logits_hook_func", lambda step, x, logits: logits)
        steps = kwargs.pop("steps", self.generation_config.steps)
        x = nn.functional.pad(inputs, (0, kwargs.pop("max_new_tokens")), value=MASK)
        wants = kwargs.pop("return_dict_in_generate", False)
        times = torch.linspace(1, self.generation_config.eps, steps + 1)
        x = tokens_hook(None, x, None)
        for i in range(steps):
            masked = x == MASK
            logits = self(x).logits
            logits = logits_hook(i, x, torch.cat([logits[:, :1], logits[:, :-1]], dim=1))
            p = logits.softmax(-1)
            p[..., MASK] = 0
            sure = (p * (p + 1e-10).log()).sum(-1).masked_fill(~masked, -torch.inf)
            for row in range(len(x)):
                left = int(masked[row].sum())
                count = int(left * (1 - times[i + 1] / times[i])) if i < steps - 1 else left
                places = sure[row].topk(count).indices
                x[row, places] = p[row, places].argmax(-1)
            x = tokens_hook(i, x, logits)
        return SimpleNamespace(sequences=x, history=None) if wants else x
