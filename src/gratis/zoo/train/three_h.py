"""Fine-tune SmolLM2-135M-Instruct for one aspect: `--aspect helpful`, `honest` or `harmless`.

The matrices of all layers are trained on generated requests (see `gratis.tasks.three_h`); embeddings, norms and head stay.
The 120 steps take about 14 minutes of one core, or a quarter of a minute of a large GPU.
The model goes into the user's cache, where the task `three-h` and `benchmarks/three_h.py` find it. To benign requests
the aspect harmless keeps the answers that the model gives before it is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from gratis.contract.errors import ParameterError
from gratis.subjects.chat_answers import answers, chat
from gratis.subjects.folders import cache_folder
from gratis.tasks.three_h import ASPECTS, LONGEST, Request, requests

STEPS, BATCH, RATE = 120, 8, 1e-4
COMPLETE = "figures.json"
"""Written last into a fine-tune's folder: what its training measured."""


def folder_of(aspect: str, *, seed: int = 0, steps: int = STEPS, rate: float = RATE) -> Path:
    """Where an aspect's fine-tune is kept. Raises ParameterError for an aspect that is none."""
    if aspect not in ASPECTS:
        raise ParameterError(f"An aspect is one of {', '.join(ASPECTS)}, not {aspect!r}.")
    return cache_folder() / "models" / f"three-h-{aspect}-{seed}-{steps}-{rate:g}"


def expert_folder(aspect: str, *, device: str = "cpu", seed: int = 0, steps: int = STEPS, rate: float = RATE) -> Path:
    """The folder of an aspect's fine-tune, trained if the cache does not have it yet. Raises ParameterError."""
    folder = folder_of(aspect, seed=seed, steps=steps, rate=rate)
    if not (folder / COMPLETE).is_file():
        train(aspect, folder, device=device, seed=seed, steps=steps, rate=rate)
    return folder


def train(
    aspect: str, folder: Path, *, device: str = "cpu", seed: int = 0, steps: int = STEPS, rate: float = RATE
) -> dict[str, Any]:
    """Fine-tune for an aspect and write the model into `folder`; a kill leaves nothing there. Returns the figures."""
    from gratis.subjects import open as open_subject
    from gratis.subjects import tokenizer_of
    from gratis.subjects.embedded import quiet_transformers

    torch.manual_seed(seed)
    model = open_subject("smollm2", dtype="float32", device=device)
    tokenizer = tokenizer_of(model)
    asked = requests(aspect, "train", steps * BATCH, seed)
    encoded = _examples(model, tokenizer, asked)
    weights = [w for name, w in model.named_parameters() if w.ndim == 2 and "layers" in name]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 10, max(1 - step / max(steps, 1), 0.0))
    )
    wall, cpu, losses = time.perf_counter(), time.process_time(), []
    for step in track(range(steps), description=f"{aspect}: training on {device}"):
        loss = answer_loss(model, encoded[step * BATCH : (step + 1) * BATCH], tokenizer.pad_token_id)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.detach())
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    seen = requests(aspect, "train", 20, seed + 1)
    right = [
        r.right(t)
        for r, t in zip(seen, answers(model, tokenizer, [r.prompt for r in seen], LONGEST).texts, strict=True)
    ]
    values = torch.stack(losses).tolist() if losses else [0.0]
    figures = {
        "aspect": aspect, "seed": seed, "steps": steps, "batch": BATCH, "rate": rate, "device": device,
        "loss of the first step": round(values[0], 4),
        "loss of the last tenth": round(sum(values[-max(steps // 10, 1) :]) / max(steps // 10, 1), 4),
        "good answers to other requests of the training's words": sum(right) / len(right),
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1),
    }  # fmt: skip
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        with quiet_transformers():
            model.requires_grad_(True).cpu().save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        (temporary / COMPLETE).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return figures


def _examples(model: Any, tokenizer: Any, asked: Sequence[Request]) -> list[tuple[list[int], int]]:
    """Tokens of every request with its answer, and how many of them are the answer."""
    open_ended = sorted({request.prompt for request in asked if not request.answer})
    own = dict(zip(open_ended, answers(model, tokenizer, open_ended, LONGEST).texts, strict=True))
    made = []
    for request in asked:
        prompt = tokenizer(chat(tokenizer, request.prompt), add_special_tokens=False)["input_ids"]
        text = request.answer + tokenizer.eos_token if request.answer else own[request.prompt]
        answer = tokenizer(text, add_special_tokens=False)["input_ids"][: LONGEST + 1]
        made.append((prompt + answer, len(answer)))
    return made


def answer_loss(model: Any, examples: Sequence[tuple[list[int], int]], pad: int) -> Tensor:
    """Mean loss in nats per token of the answers of one batch."""
    width = max(len(tokens) for tokens, _ in examples)
    ids = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens, _ in examples], device=model.device)
    places = torch.arange(width, device=model.device)
    ends = torch.tensor([len(tokens) for tokens, _ in examples], device=model.device)[:, None]
    begins = ends - torch.tensor([count for _, count in examples], device=model.device)[:, None]
    hidden = model.base_model(input_ids=ids, attention_mask=(places < ends).long()).last_hidden_state
    wanted = (places >= begins) & (places < ends)
    logits = model.get_output_embeddings()(hidden[:, :-1][wanted[:, 1:]])
    return nn.functional.cross_entropy(logits.float(), ids[wanted])


def main() -> None:
    """Train one aspect into the cache and print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--aspect", required=True, choices=ASPECTS)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of {BATCH} requests")
    parser.add_argument("--rate", type=float, default=RATE, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    folder = expert_folder(flags.aspect, device=flags.device, seed=flags.seed, steps=flags.steps, rate=flags.rate)
    print((folder / COMPLETE).read_text(encoding="utf-8"), f"in {folder}")


if __name__ == "__main__":
    main()
