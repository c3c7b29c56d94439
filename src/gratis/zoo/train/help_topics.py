"""Train `help-softmax` or `help-softplus` (`--attention`): byte-level language models of the help topics of Python.

All have the same size and see the same text in pieces of 128 bytes, for the same number of steps; they differ in their
attention. What they lose on longer pieces shows how each extrapolates.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import gratis
from gratis.methods.attention.softplus import MARK, SoftplusAttention
from gratis.tasks.length_extrapolation import LENGTH, losses, texts
from gratis.zoo.train.loop import arguments, fit, save_half, write_card

LENGTHS = (128, 256, 512, 1024, 2048)
ATTENTION: dict[str, dict[str, Any] | None] = {
    "softmax": None,
    "softplus": {"power": 15.0},
    "softplus-mild": {"power": 3.0},
    "softplus-plain": {"reweight": False},
}


def language_model(attention: str) -> Any:
    """Four layers of width 128 with rotary positions; its configuration says which attention it is trained with."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=max(LENGTHS), tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    if ATTENTION[attention] is not None:
        setattr(config, MARK, "softplus")
    return LlamaForCausalLM(config)


def main() -> None:
    """Train with one attention, save, measure as saved."""
    attention = "softplus" if "--attention" not in sys.argv else sys.argv.pop(sys.argv.index("--attention") + 1)
    sys.argv = [argument for argument in sys.argv if argument != "--attention"]
    if attention not in ATTENTION:
        sys.exit(f"--attention must be one of {', '.join(ATTENTION)}")
    flags = arguments(__doc__ or "", steps=2000, batch=24, rate=2e-3)
    train, held_out = texts()
    model = language_model(attention).eval()
    settings = ATTENTION[attention]
    generator = torch.Generator().manual_seed(flags.seed)

    def loss_at(step: int) -> Tensor:
        starts = torch.randint(0, len(train) - LENGTH, (flags.batch,), generator=generator)
        batch = train[starts[:, None] + torch.arange(LENGTH)]
        return model(input_ids=batch, labels=batch).loss  # type: ignore[no-any-return]

    method = SoftplusAttention(**settings, block=None) if settings is not None else None
    with gratis.attach(model, method) if method is not None else nullcontext():
        model.train()
        fitted = fit(loss_at, model.parameters(), steps=flags.steps, rate=flags.rate, decay=0.05)
        model.eval()
    folder = flags.out / f"help-{attention}"
    save_half(model, folder)
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with gratis.attach(saved, SoftplusAttention(**settings)) if settings is not None else nullcontext():
        figures = {
            f"loss at {length}": round(statistics.fmean(losses(saved, held_out, length)), 4) for length in LENGTHS
        }
    write_card(
        folder,
        f"help-{attention}",
        f"A byte-level language model (four layers of width 128) trained with {attention} attention on pieces of {LENGTH} "
        "bytes. `loss at N` is the mean loss of the last 64 bytes of held-out pieces of N bytes, in nats per byte.",
        "the help topics that ship with Python, the last 15 % held out",
        'gratis.open("zoo:help-softplus") with gratis.SoftplusAttention() attached, beside "zoo:help-softmax" without',
        {**figures, **fitted},
        script="help_topics",
        flags=f" --attention {attention}",
    )


if __name__ == "__main__":
    main()
