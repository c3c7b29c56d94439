"""What a model trained with softmax makes of sharper attention: mild sharpening, and the re-weighting of softplus attention.

    OMP_NUM_THREADS=1 python benchmarks/reweighting.py

On the embedded language model, pieces of documentation text. Weights a of a softmax over N keys become
`relu(N a - offset)^power`, normalised (offset 0 in the first three rows), in all layers and heads; a power without an offset
is a softmax of the power times the logits, as LogLengthScaling's `sharpen` has it up to 1.2. Writes
benchmarks/results/reweighting.json.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from measuring import renew
from torch import Tensor

import gratis
from gratis.contract.attach import Scope
from gratis.subjects import tokenizer_of
from gratis.subjects.attention_door import install_attention
from gratis.subjects.text import documentation, tokens_of
from gratis.trials.statistics import paired_interval

PIECES, LENGTH, FREE_ROWS = 8, 192, 3
SETTINGS = (
    (1.0, 0.0),
    (1.02, 0.0),
    (1.1, 0.0),
    (1.2, 0.0),
    (1.5, 0.0),
    (3.0, 0.0),
    (1.0, 1.0),
    (3.0, 1.0),
    (15.0, 1.0),
)


def reweighted(power: float, offset: float) -> Any:
    """An attention function of plain causal attention whose weights are weighted again."""

    def attend(inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        length, groups = query.shape[2], query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        count = torch.arange(1, length + 1)[:, None]
        scores = (query @ keys.transpose(2, 3) * kwargs["scaling"]).masked_fill(~seen, -torch.inf)
        above = torch.relu(count * scores.softmax(-1) - torch.where(count > FREE_ROWS, offset, 0.0)) * seen
        weights = (above / above.amax(-1, keepdim=True).clamp_min(1e-30)).pow(power) * seen
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
        return (weights @ values).transpose(1, 2).contiguous(), None

    return attend


@torch.no_grad()
def losses(model: Any, pieces: list[Tensor], power: float, offset: float) -> list[float]:
    scope = Scope()
    try:
        install_attention(model, "reweighted", reweighted(power, offset), scope)
        return [float(model(input_ids=piece, labels=piece).loss) for piece in pieces]
    finally:
        scope.close()


def main() -> None:
    torch.set_num_threads(1)
    model = gratis.open("smollm2")
    pieces = [tokens_of(tokenizer_of(model), documentation(), LENGTH, 9000 * at) for at in range(PIECES)]
    with torch.no_grad():
        plain = [float(model(input_ids=piece, labels=piece).loss) for piece in pieces]
    rows = []
    for power, offset in SETTINGS:
        found = losses(model, pieces, power, offset)
        low, high = paired_interval(found, plain) or (float("nan"), float("nan"))
        rows.append(
            {
                "power": power, "offset": offset, "loss, nats": round(statistics.fmean(found), 3),
                "more than the model as it is": round(statistics.fmean(found) - statistics.fmean(plain), 3),
                "from": round(low, 3), "to": round(high, 3),
            }
        )  # fmt: skip
    renew("reweighting", {f"{PIECES} pieces of {LENGTH} tokens": rows})


if __name__ == "__main__":
    main()
