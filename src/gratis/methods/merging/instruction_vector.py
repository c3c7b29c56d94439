"""Make a model that was pretrained further follow instructions: add (instruct - base).

"The Construction of Instruction-tuned LLMs for Finance without Instruction Data Using Continual Pretraining and Model
Merging", 2024: `theta_base + l_d (theta_domain - theta_base) + l_i (theta_instruct - theta_base)`. That both differences
are nearly orthogonal, so that one does not undo the other, is the paper's argument: `examine` measures it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gratis.contract.attach import attach
from gratis.contract.card import Card, Claim
from gratis.contract.errors import GratisWarning, InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.subjects.chat_answers import answers
from gratis.subjects.merging import open_inputs
from gratis.subjects.token_statistics import log_probability

if TYPE_CHECKING:
    from gratis.contract.delta import Delta

FAR = 0.5
"""Size of a change, as a share of the base's weights, from which the base is doubted: a wrong one gives about 1.4."""
ALIKE = 0.5
"""Cosine of the two changes from which the domain model seems to be instructed already."""
PROBED = 5
LARGE = 0.01
"""Share of entries, the largest in both changes, whose signs are compared."""
PIECE = 1 << 22
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
_KINDS = (("attention", r"attn|attention"), ("MLP", r"mlp|feed_forward|ffn|fc\d"), ("norm", r"norm|\bln"),
          ("embedding", r"embed|lm_head|\bwte\b|\bwpe\b"))  # fmt: skip


class InstructionVector(Merge):
    """A domain model with the difference that instruction tuning made to their common base.

    Experts are the domain model, or several, then the instruct model. Tokenizer, chat template, generation settings and
    end tokens are the instruct model's, all other settings the domain model's. Tokens that one of them added are kept with
    `tokenizer="union"`: their rows are copied whole. An instruct model that was tuned from an older base: name that base.

    For a live model, `Delta.between(base, instruct)` is the same vector: attach it, and turn its strength with the
    handle's `turn`; `choose_scale` does so without labels.
    """

    card = Card(
        title="The Construction of Instruction-tuned LLMs for Finance without Instruction Data",
        authors="",
        year=2024,
        seed=86,
        paper="arXiv:2409.19854",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="a domain model that answers instructions, without instruction data",
        unchanged_when={"scale": 0.0},
        examples={"scale": 1.0},
        limits=(
            "Instruct and domain model must descend from the same base; averaging them instead halves both. What the "
            "instruct model refuses is only partly carried over: probe the result's refusals."
        ),
        claims=(
            Claim(
                name="questions about facts that were only told plainly are answered, by 0.3 more of them than before",
                task="instruction-transfer",
                metric="answered",
                compare="difference",
                at_least=0.3,
                parameters={},
            ),
            Claim(
                name="and by 0.3 more than by the average of the two models",
                task="instruction-transfer",
                metric="answered",
                compare="difference",
                at_least=0.3,
                against="average",
                parameters={},
            ),
            Claim(
                name="which costs at most 0.4 of what the domain model recalls plainly",
                task="instruction-transfer",
                metric="recall",
                compare="difference",
                at_least=-0.4,
                parameters={},
            ),
        ),
    )
    differences = False
    describes = -1
    configures = 0

    scale: float = param(
        1.0, help="factor of the instruction vector (lambda_inst); 0 returns the domain model", search=(0.25, 1.25)
    )
    domain_scale: float = param(1.0, help="factor of the domain's change (lambda_dom)", search=(0.5, 1.25))
    exclude: tuple[str, ...] = param((), help="regular expressions of names of tensors that stay the domain model's")

    def check_parameters(self) -> None:
        if self.scale > 2:
            warnings.warn(f"InstructionVector: a scale of {self.scale:g} is far; about 1 is usual.", GratisWarning)

    def check_experts(self, count: int) -> None:
        if count < 2:
            raise InputError(
                f"InstructionVector needs two experts, the domain model and the instruct model, not {count}."
            )

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        *domains, instruct = experts
        assert part.base is not None
        if len(domains) == 1 and part.weights[0] == 1:
            alone = self.domain_scale == 1 and self.scale == 0
            if alone or any(re.search(pattern, part.tensor) for pattern in self.exclude):
                return domains[0]
        *weights, weight = part.weights
        if self.domain_scale == 0 and self.scale * weight == 1:
            return instruct
        scale = 0.0 if any(re.search(pattern, part.tensor) for pattern in self.exclude) else self.scale * weight
        # In float64: adding a difference back in float32 can lose the smaller of two numbers.
        base = part.base.double()
        merged = base + scale * (instruct.double() - base)
        for domain, own in zip(domains, weights, strict=True):
            merged.add_(domain.double().sub_(base), alpha=self.domain_scale * own)
        return merged.float()


@dataclass(frozen=True)
class Kinship:
    """How a domain model's and an instruct model's changes to their base relate."""

    cosine: float
    """Of the two changes, over all weights; near 0 where adding one does not undo the other."""
    by_layer: dict[int, float]
    by_kind: dict[str, float]
    """The same for attention, MLP, embedding, norm and the rest."""
    sign_agreement: float
    """Share of the entries that are large in both changes (the top 1 % of their products) with one sign; 0.5 is chance."""
    domain_size: float
    """Norm of the domain's change as a share of the base's norm."""
    instruct_size: float
    warnings: list[str] = field(default_factory=list)


def examine(base: Any, domain: Any, instruct: Any, *, tokenizer: str = "error", max_cosine: float = ALIKE) -> Kinship:
    """Are the three of one family, and are the two changes independent? Checkpoints or state dicts.

    Five tensors are looked at first, then all, in pieces. Warns of a base that seems wrong, of a domain model that seems
    instructed, and of settings of the positions that differ. Raises InputError for three equal models, values that are not
    finite, tensors that do not fit, or an instruct model without a chat template.
    """
    first, (second, third) = open_inputs(InstructionVector(), [domain, instruct], base, tokenizer=tokenizer)
    names = [n for n, place in first.places.items() if place.dtype.is_floating_point and place.elements]
    draw = torch.Generator().manual_seed(0)
    probed = [names[i] for i in torch.randperm(len(names), generator=draw)[:PROBED].tolist()]
    found = [*_settings(first, second), *_far(_products(first, second, third, probed), "of five tensors")]
    _check_template(third)
    for text in found:
        warnings.warn(text, GratisWarning, stacklevel=2)
    seen = _products(first, second, third, names)
    total = {key: sum(row[key] for row in seen.values()) for key in next(iter(seen.values()))}
    if total["dd"] == total["ii"] == 0:
        raise InputError("Base, domain and instruct model are the same: there is nothing to add.")
    layers: dict[int, list[dict[str, float]]] = {}
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, row in seen.items():
        if number := re.search(r"(?:^|\.)(\d+)\.", name):
            layers.setdefault(int(number[1]), []).append(row)
        kinds.setdefault(next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other"), []).append(row)
    cosine = _cosine(seen.values())
    later = [] if found else _far(seen, "of the whole model")
    if cosine > max_cosine:
        later.append(f"The two changes are alike (cosine {cosine:.2f}): was the domain model instructed already?")
    for text in later:
        warnings.warn(text, GratisWarning, stacklevel=2)
    return Kinship(
        cosine, {layer: _cosine(rows) for layer, rows in sorted(layers.items())},
        {kind: _cosine(rows) for kind, rows in sorted(kinds.items())},
        total["agree"] / total["large"] if total["large"] else math.nan,
        math.sqrt(total["dd"] / total["bb"]) if total["bb"] else math.inf,
        math.sqrt(total["ii"] / total["bb"]) if total["bb"] else math.inf, [*found, *later],
    )  # fmt: skip


def _products(base: Any, domain: Any, instruct: Any, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """By tensor: inner products of base, domain's and instruct's change, and signs where both changes are large."""
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        row = dict.fromkeys(("bb", "dd", "ii", "di", "agree", "large"), 0.0)
        elements = base.places[name].elements
        for start in range(0, elements, PIECE):
            piece = (name, start, min(PIECE, elements - start))
            b, d, i = (source.view(*piece).double() for source in (base, domain, instruct))
            d, i = d - b, i - b
            row["bb"] += float(b @ b)
            row["dd"] += float(d @ d)
            row["ii"] += float(i @ i)
            row["di"] += float(d @ i)
            product = d * i
            largest = product[product.abs().topk(max(int(LARGE * len(product)), 1)).indices]
            row["agree"] += float((largest > 0).sum())
            row["large"] += float((largest != 0).sum())
        if not all(math.isfinite(value) for value in row.values()):
            raise InputError(f"Tensor {name!r} holds values that are not finite.")
        rows[name] = row
    return rows


def _cosine(rows: Any) -> float:
    rows = list(rows)
    size = math.sqrt(sum(row["dd"] for row in rows) * sum(row["ii"] for row in rows))
    return sum(row["di"] for row in rows) / size if size else 0.0


def _far(rows: Mapping[str, Mapping[str, float]], where: str) -> list[str]:
    size = math.sqrt(sum(row["bb"] for row in rows.values())) or 1.0
    found = []
    for key, which in (("dd", "domain"), ("ii", "instruct")):
        share = math.sqrt(sum(row[key] for row in rows.values())) / size
        if share > FAR:
            found.append(
                f"The {which} model differs from the base by {share:.2f} of its size ({where}): is it the right base?"
            )
    return found


def _settings(base: Any, domain: Any) -> list[str]:
    one, other = (source.config() for source in (base, domain))
    keys = ("rope_theta", "rope_parameters", "rope_scaling", "max_position_embeddings")
    return [
        f"The domain model changed {key} from {one.get(key)} to {other[key]}: the result keeps the domain model's."
        for key in keys
        if key in other and other[key] != one.get(key)
    ]


def _check_template(instruct: Any) -> None:
    folder = getattr(instruct, "folder", None)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return
    settings = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file() or (settings.is_file() and "chat_template" in settings.read_text()):
        return
    raise InputError(f"The instruct model {folder} has no chat template, so the result could not be asked: add it.")


@dataclass(frozen=True)
class ScaleChoice:
    """What each scale of an instruction vector came to, and the one to take."""

    scale: float
    rows: list[dict[str, float]]
    """Per scale, 0 first: scale, perplexity of plain text of the domain, share of well-formed answers."""


def choose_scale(
    domain: Any,
    vector: Delta,
    tokenizer: Any,
    *,
    texts: Sequence[str],
    prompts: Sequence[str],
    scales: Sequence[float] = SCALES,
    max_new_tokens: int = 64,
    rise: float = 0.05,
    share: float = 0.95,
    progress: Callable[[float, str], None] | None = None,
) -> ScaleChoice:
    """The smallest scale of an instruction vector that is nearly as good as the best, without labels (step 7).

    `domain` is the live model, `vector` is `Delta.between(base, instruct)`, `tokenizer` the instruct model's. Perplexity
    of `texts` (the domain's, plain) may rise by `rise`; an answer to one of `prompts` (of any kind) is well-formed where it
    ends before `max_new_tokens` and does not repeat the prompt; the choice has at least `share` of the best share of these.
    Raises InputError where no scale keeps the perplexity, or no answer is well-formed. The model comes back as it was.
    """
    if not texts or not prompts or not scales:
        raise InputError("choose_scale needs texts of the domain, prompts and scales; one of them is empty.")
    if isinstance(texts, str) or isinstance(prompts, str):
        raise InputError("choose_scale needs lists of texts and prompts, not one string.")
    tell = progress or (lambda fraction, words: None)
    rows = []
    with attach(domain, vector) as handle:
        for done, scale in enumerate((0.0, *sorted(scales))):
            handle.turn(scale)
            found = answers(domain, tokenizer, prompts, max_new_tokens)
            formed = [
                ended and bool(text.strip()) and prompt.casefold() not in text.casefold()
                for prompt, text, ended in zip(prompts, found.texts, found.ended, strict=True)
            ]
            rows.append(
                {
                    "scale": scale,
                    "perplexity": perplexity(domain, tokenizer, texts),
                    "formed": sum(formed) / len(formed),
                }
            )
            tell((done + 1) / (len(scales) + 1), f"scale {scale:g}: {rows[-1]['formed']:.2f} well-formed")
    within = [row for row in rows[1:] if row["perplexity"] <= (1 + rise) * rows[0]["perplexity"]]
    if not within:
        raise InputError(
            f"Every scale raises the perplexity of the domain's texts by more than {rise:.0%}: try smaller scales than "
            f"{min(scales):g}."
        )
    best = max(row["formed"] for row in within)
    if best == 0:
        raise InputError("No answer is well-formed at any scale: is the tokenizer the instruct model's?")
    return ScaleChoice(min(row["scale"] for row in within if row["formed"] >= share * best), rows)


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 16) -> float:
    """Exp of the mean loss in nats per token of plain texts, each token given those before it."""
    total, count = 0.0, 0
    encoded = [row for text in texts if len(row := tokenizer(text)["input_ids"]) > 1]
    if not encoded:
        raise InputError("Perplexity needs texts of at least two tokens.")
    for at in range(0, len(encoded), batch):
        rows = encoded[at : at + batch]
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        mask = (
            torch.arange(width, device=model.device)
            < torch.tensor([len(r) for r in rows], device=model.device)[:, None]
        )
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1][mask[:, 1:]]
        total -= float(log_probability(logits.float(), ids[:, 1:][mask[:, 1:]]).sum())
        count += int(mask[:, 1:].sum())
    return math.exp(total / count)
