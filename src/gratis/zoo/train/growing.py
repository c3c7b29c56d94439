"""Train `glyphs-code` and `glyphs-prose`: character models that grow layer by layer on drawn, frozen embeddings.

    python -m gratis.zoo.train.growing [--data code|prose|both] [--how layers|whole] [--embeddings frozen|trained]

`--how whole` trains all layers at once for as many steps in all: the twin that growth is held against.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gratis.subjects.opening import set_tokenizer
from gratis.tasks.two_texts import KINDS, LENGTH, bits_per_character, held_out_pieces
from gratis.zoo.glyphs import glyph_embeddings
from gratis.zoo.growing import blocks_of, frozen_embeddings, grow, low_rank_updates, trainable
from gratis.zoo.library_text import CHARACTERS, library_text
from gratis.zoo.text import character_tokenizer
from gratis.zoo.train.loop import arguments, fit, save_half, write_card

WIDTH, HEADS, WINDOW = 128, 4, 512
WRITTEN = {"\n": "\\n"}
"""A newline has no shape and would look like a space."""
RATE = 3e-3
LOW_RANK_RATE = 1e-2


def tokenizer() -> Any:
    """Every character a token."""
    return character_tokenizer(CHARACTERS, WINDOW)


def character_model(layers: int) -> Any:
    """A Llama of width 128 whose input table is the drawn one and whose head is a table of its own."""
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=WINDOW,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    table = glyph_embeddings(tokenizer(), width=WIDTH, written=WRITTEN).embeddings
    return frozen_embeddings(LlamaForCausalLM(config), table)


def encoded(kind: str) -> Tensor:
    """The characters of the training text of a kind, or of both in turns, as ids (length,) uint8."""
    table = torch.zeros(128, dtype=torch.uint8)
    vocabulary = tokenizer().get_vocab()
    for letter in CHARACTERS:
        table[ord(letter)] = vocabulary[letter]
    kinds: Any = KINDS if kind == "both" else (kind,)
    texts = [library_text(one, held_out=False).encode() for one in kinds]
    size = min(map(len, texts))
    return table[torch.frombuffer(bytearray(b"".join(text[:size] for text in texts)), dtype=torch.uint8).long()]


def flags(parser: argparse.ArgumentParser) -> None:
    """What this script takes beyond what all take."""
    parser.add_argument("--data", choices=[*KINDS, "both"], default="code")
    parser.add_argument("--how", choices=["layers", "whole"], default="layers", help="layer by layer, or all at once")
    parser.add_argument("--embeddings", choices=["frozen", "trained"], default="frozen", help="trained: with `whole`")
    parser.add_argument("--start", choices=["identity", "random"], default="identity", help="how a new layer begins")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", help="peak learning rates of the stages, in place of --rate")
    parser.add_argument("--rank", type=int, default=16, help="of the updates in the last stage; 0 leaves the stage out")
    parser.add_argument("--last-steps", type=int, default=2300, help="steps of the stage of low-rank updates")
    parser.add_argument("--last-rate", type=float, default=LOW_RANK_RATE)
    parser.add_argument("--name", default="", help="name of the model's folder; by default from --data and --how")


def main() -> None:
    """Train, save, measure as saved."""
    wish = arguments((__doc__ or "").split("\n")[0], steps=200, batch=24, rate=RATE, more=flags)
    if wish.embeddings == "trained" and wish.how == "layers":
        raise SystemExit("growing needs embeddings that stay: --embeddings trained goes with --how whole")
    grown = wish.how == "layers"
    if wish.pace:
        print("CPU seconds of a step, by stage:", cpu_paces(wish.layers, wish.batch, grown, wish.rank))
        return
    model = character_model(1 if grown else wish.layers).to(wish.device)
    set_tokenizer(model, tokenizer())
    held_out = {kind: held_out_pieces(kind, 128) for kind in KINDS}
    begin = time.perf_counter()
    stages = trained(model, wish, held_out)
    seconds = round(time.perf_counter() - begin, 1)
    name = wish.name or f"glyphs-{wish.data}" + ("" if grown else "-whole")
    folder = wish.out / name
    save_half(model.cpu(), folder)
    tokenizer().save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    set_tokenizer(model, tokenizer())
    write_card(
        folder,
        name,
        f"A character model (Llama, {wish.layers} layers of width {WIDTH}) of {wish.data} on drawn embeddings, "
        + ("grown layer by layer, each trained while those below it were frozen, and finished by low-rank updates."
           if grown else f"all layers trained at once, for as many steps; the embeddings were {wish.embeddings}."),
        "the standard library of Python, nine modules of ten: code without comments, or docstrings",
        'gratis.open("zoo:glyphs-code") with gratis.LogitMixture(experts=("zoo:glyphs-prose",))',
        {**figures(model, wish, stages, seconds), **measured(model, held_out)},
        script="growing",
        flags=f" --data {wish.data} --how {wish.how}" + ("" if wish.embeddings == "frozen" else " --embeddings trained"),
        device=wish.device,
    )  # fmt: skip


def trained(model: Any, wish: argparse.Namespace, held_out: dict[str, list[str]]) -> list[dict[str, float]]:
    """Train `model` as `wish` says, in place; what every stage took and reached."""
    text = encoded(wish.data).to(wish.device)
    generator = torch.Generator().manual_seed(wish.seed)
    stages: list[dict[str, float]] = []
    last_steps = wish.last_steps if wish.rank else 0
    total = wish.layers * wish.steps + last_steps
    rates = wish.rates or [wish.rate]

    def loss_at(step: int) -> Tensor:
        starts = torch.randint(0, len(text) - LENGTH, (wish.batch,), generator=generator)
        batch = text[(starts[:, None] + torch.arange(LENGTH)).to(wish.device)].long()
        return model(input_ids=batch, labels=batch, use_cache=False).loss  # type: ignore[no-any-return]

    def train(model: Any, number: int, steps: int = 0) -> dict[str, float]:
        last = wish.how == "layers" and number == wish.layers
        steps = steps or (last_steps if last else wish.steps)
        rate = wish.last_rate if last else rates[min(number, len(rates) - 1)]
        before = measured(model, held_out)
        model.train()
        fitted = fit(
            loss_at, model.parameters(), steps=steps, rate=rate, decay=0.05, seconds=wish.seconds * steps / total,
            say=f"stage {number + 1}",
        )  # fmt: skip
        found = {
            **fitted, **{f"{name}, before": value for name, value in before.items()}, **measured(model, held_out)
        }  # fmt: skip
        stages.append({"layers": model.config.num_hidden_layers, "trained": trainable(model), **found})
        return found

    if wish.how == "layers":
        grow(model, train, wish.layers, start=wish.start, rank=wish.rank)
    else:
        model.requires_grad_(True)
        model.get_input_embeddings().weight.requires_grad_(wish.embeddings == "trained")
        train(model, 0, steps=total)
    return stages


def measured(model: Any, held_out: dict[str, list[str]]) -> dict[str, float]:
    """Bits per character of pieces of each kind of text that training has not seen."""
    model.eval()
    return {f"bits per character of {kind}": round(statistics.fmean(bits_per_character(model, pieces)[0]), 4)
            for kind, pieces in held_out.items()}  # fmt: skip


def figures(model: Any, wish: argparse.Namespace, stages: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    """What the card says of the training."""
    grown = wish.how == "layers"
    found: dict[str, Any] = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "largest number trained at once": int(max(stage["trained"] for stage in stages)),
        "seed": wish.seed, "batch": wish.batch, "device": wish.device, "steps": int(sum(s["steps"] for s in stages)),
        "seconds": seconds, "cpu_seconds": round(sum(stage["cpu_seconds"] for stage in stages), 1),
        "loss": stages[-1]["loss"],
    }  # fmt: skip
    for number, stage in enumerate(stages if grown else ()):
        what = f"after stage {number + 1}, {int(stage['layers'])} layers"
        found[what] = stage[f"bits per character of {wish.data if wish.data != 'both' else 'code'}"]
    paces = cpu_paces(wish.layers, wish.batch, grown, wish.rank)
    steps = [wish.steps] * wish.layers + [wish.last_steps] if grown else [found["steps"]]
    estimate = sum(pace * count for pace, count in zip(paces, steps, strict=False))
    found["estimate of CPU seconds on one thread"] = round(estimate, 1)
    return found


def cpu_paces(layers: int, batch: int, grown: bool, rank: int, steps: int = 4) -> list[float]:
    """CPU seconds of a step on this machine with one thread, for every stage of growth or for all layers at once."""
    torch.set_num_threads(1)
    ids = torch.randint(4, len(CHARACTERS), (batch, LENGTH))

    def pace(model: Any) -> float:
        def loss_at(step: int) -> Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

        return fit(loss_at, model.parameters(), steps=steps, rate=0.0, say="pace")["cpu_seconds"] / steps

    if not grown:
        return [pace(character_model(layers))]
    paces = []
    for depth in range(1, layers + 1):
        model = character_model(depth)
        blocks_of(model)[:-1].requires_grad_(False)
        paces.append(pace(model))
    if rank:
        blocks_of(model).requires_grad_(False)
        with low_rank_updates(blocks_of(model), rank):
            paces.append(pace(model))
    return paces


if __name__ == "__main__":
    main()
