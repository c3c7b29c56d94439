"""Guided captioning: say what tells this picture from others, by guidance away from what would be said of any.

S. Kornblith, L. Li, Z. Wang and T. Nguyen, "Guiding Image Captioning Models Toward More Specific Captions", ICCV 2023
(arXiv 2307.16686). With c = log p(. | text, picture) and u = log p(. | text), tokens are chosen by

    log p~ = u + gamma (c - u) + const,   or with a language model q:   log p~ = alpha log q + beta (c - u) + const.

No code of the authors is public; what is from memory of the paper is said on the method's page.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.attach import Attachment, Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.cache_followers import follow, followers
from gratis.subjects.call_arguments import by_name
from gratis.subjects.captioners import NULL_IMAGE, Captioner, Null, Side, captioner
from gratis.subjects.language import language_model
from gratis.subjects.opening import open as open_subject
from gratis.subjects.opening import tokenizer_of
from gratis.subjects.same_tokens import differences


class GuidedCaptioning(Decoding):
    """Guidance inside a captioner's own `generate`: greedy, sampling and beams; processors of the call act afterwards.

    The picture is encoded once; the text is read with it and without it, each with a cache of its own, so that every
    token is read once by each side. Scores and logits that generate returns are log-probabilities of the guided
    distribution. A plain language model is guided too: its prompt is what is left out.
    """

    card = Card(
        title="Guiding Image Captioning Models Toward More Specific Captions",
        authors="Kornblith, Li, Wang, Nguyen",
        year=2023,
        seed=89,
        paper="arXiv 2307.16686",
        acts_on="language model",
        free_of=("gradients", "labels"),
        summary="captions that say what tells a picture from others",
        unchanged_when={"gamma": 1.0},
        examples={"gamma": 2.0, "null": "absent"},
        holds=("generate", "logits", "text of a pass"),
        why={"text of a pass": "reads two, with the picture or prompt and without it"},
        differs=(
            "Reading without the picture is the paper's for captioners that were trained with dropped pictures "
            "(null='trained'). The other ways, the cut and the guidance of plain language models by their prompt are this "
            "project's, and need no training. The paper's weights of language-model guidance are not known exactly."
        ),
        limits=(
            "Two passes per token, or one per other picture. Captions become longer and less like the references, and "
            "from about gamma 3 on they invent details."
        ),
        claims=(
            Claim(
                name="captions find their picture among 32 more often",
                task="picture-captions",
                metric="recall",
                compare="difference",
                parameters={"gamma": 2.0},
                task_parameters={"pictures": 256},
                at_least=0.1,
            ),
            Claim(
                name="captions are less often what people said",
                task="picture-captions",
                metric="reference",
                compare="difference",
                parameters={"gamma": 3.0},
                task_parameters={"pictures": 256},
                at_most=-0.1,
            ),
            Claim(
                name="captions say more that is true",
                task="picture-captions",
                metric="attributes",
                compare="difference",
                parameters={"gamma": 2.0},
                task_parameters={"pictures": 256},
                at_least=0.05,
            ),
        ),
    )

    gamma: float = param(2.0, at_least=0, help="guidance: 1 is ordinary decoding, 0 ignores the picture")
    null: Literal["trained", "zeros", "absent", "grey", "mean", "others"] = param(
        "trained",
        help="what is read for no picture: what the model was trained with, features of zeros, none at all, a grey "
        "picture, the mean of `pictures`, or the mean of the probabilities with each of `pictures`",
    )
    pictures: Any | None = param(None, help="pixel values (M, 3, H, W) of other pictures, for null 'mean' and 'others'")
    lm: Any | None = param(None, help="language model that says what a good caption is, or its name for gratis.open")
    lm_prompt: str = param("", help="what the language model reads before the caption, such as captions of the style")
    lm_tokens: tuple[int, ...] | None = param(
        None, help="the language model's id for each of the captioner's, -1 for none, where their tokens differ"
    )
    alpha: float = param(1.0, at_least=0, help="weight of the language model")
    beta: float | None = param(None, at_least=0, help="guidance with a language model; None is gamma")
    cut: float | None = param(
        None, above=0, at_most=1, help="tokens less likely with the picture than so much of the likeliest are left out"
    )

    def check_parameters(self) -> None:
        for name in ("gamma", "alpha", "beta"):
            if not math.isfinite(getattr(self, name) or 0):
                raise ParameterError(f"GuidedCaptioning: {name} must be a finite number.")
        if self.null in {"mean", "others"}:
            if not isinstance(self.pictures, Tensor) or self.pictures.dim() < 4 or len(self.pictures) < 2:
                raise ParameterError(
                    f"GuidedCaptioning: null={self.null!r} needs pictures, the pixel values (M, 3, H, W) of at least two."
                )
        elif self.pictures is not None:
            raise ParameterError("GuidedCaptioning: pictures go with null='mean' or null='others'.")
        if self.lm is None and (self.lm_prompt or self.lm_tokens or self.beta is not None or self.alpha != 1):
            raise ParameterError("GuidedCaptioning: alpha, beta, lm_prompt and lm_tokens go with a language model, lm.")

    def check(self, subject: Any) -> None:
        found = captioner(subject, "GuidedCaptioning")
        if self.null == "trained" and getattr(subject.config, NULL_IMAGE, None) != "zeros":
            raise SubjectError(
                f"{type(subject).__name__} does not say that it was trained with dropped pictures "
                f"(config.{NULL_IMAGE} = 'zeros'): use null='others' with other pictures, 'absent', 'zeros' or 'grey'."
            )
        found.check_null(self.way, "GuidedCaptioning")
        lm = self.lm.subject if isinstance(self.lm, Attachment) else self.lm
        if lm is not None and not isinstance(lm, str):
            language_model(lm, "The language model of GuidedCaptioning")
            self._check_vocabulary(subject, lm)

    def _check_vocabulary(self, subject: Any, lm: Any) -> None:
        if self.lm_tokens is not None:
            size = lm.get_input_embeddings().num_embeddings
            if max(self.lm_tokens) >= size:
                raise SubjectError(f"lm_tokens has the id {max(self.lm_tokens)}; the language model has {size} tokens.")
            return
        found = differences(tokenizer_of(subject).get_vocab(), tokenizer_of(lm).get_vocab())
        if found:
            raise SubjectError(
                f"Captioner and language model of GuidedCaptioning need one vocabulary, but {found}; say with lm_tokens "
                "which tokens belong together."
            )

    @property
    def way(self) -> Null:
        """How the text is read without the picture."""
        ways: dict[str, Null] = {"trained": "zeros", "zeros": "zeros", "absent": "absent"}
        return ways.get(self.null, "pictures")

    def install(self, subject: Any, scope: Scope) -> Any:
        if self.gamma == 1 and self.lm is None and self.cut is None:
            return lambda: {"guided_tokens": 0}
        lm = self.lm.subject if isinstance(self.lm, Attachment) else self.lm
        if isinstance(lm, str):
            lm = open_subject(lm)
            self.replace(lm=lm).check(subject)
        guide = _Guide(self, captioner(subject, "GuidedCaptioning"), lm)
        inner = subject.generate
        signature = inspect.signature(inner)

        @functools.wraps(inner)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with guide.text(by_name(signature, args, kwargs)):
                return inner(*args, **kwargs)

        writer = guide.captioner.writer
        forward = writer.forward

        @functools.wraps(forward)
        def guided(*args: Any, **kwargs: Any) -> Any:
            return guide(*args, **kwargs)

        scope.set_attribute(subject, "generate", generate)
        scope.set_attribute(writer, "forward", guided)
        return lambda: {
            "guided_tokens": guide.guided,
            "forward_passes": guide.passes,
            "passes_without_picture": guide.null_passes,
            "passes_of_the_language_model": guide.lm_passes,
        }

    def scores(self, subject: Any, sequences: Tensor, **inputs: Any) -> CaptionScores:
        """How captions that generate returned are judged, of the same `inputs`: each is read once, by both sides.

        `sequences` (B, length) are generate's own, with their prompt and padding. The subject need not have this method
        attached, and must not have another guidance. Raises InputError where `sequences` has no tokens after the prompt.
        """
        self.check(subject)
        lm = self.lm.subject if isinstance(self.lm, Attachment) else self.lm
        lm = open_subject(lm) if isinstance(lm, str) else lm
        guide = _Guide(self, captioner(subject, "GuidedCaptioning"), lm)
        return guide.judge(sequences, inputs)

    def combine(self, c: Tensor, u: Tensor, q: Tensor | None = None) -> Tensor:
        """Log-probabilities of the guided distribution, of c, u (and those of the language model), (…, V), float32.

        Steps 1 and 4 of the algorithm. A token that is impossible with the picture stays so.
        """
        difference = c - u
        if q is None and self.gamma == 0:
            mixed = u
        elif q is None:
            mixed = u + self.gamma * difference
        else:
            mixed = self.alpha * q + (self.gamma if self.beta is None else self.beta) * difference
        # Where a token is impossible on both sides the difference is not a number.
        mixed = mixed.masked_fill(mixed.isnan() | c.isneginf() if self.gamma > 0 else mixed.isnan(), -math.inf)
        if self.cut is not None:
            mixed = mixed.masked_fill(c < c.amax(-1, keepdim=True) + math.log(self.cut), -math.inf)
        return mixed.log_softmax(-1)


@dataclass(frozen=True)
class CaptionScores:
    """Each (B,) or (B, tokens), in nats; tokens after a caption's end count nothing."""

    guided: Tensor
    """(B, tokens) log-probability of each token under the guided distribution."""
    likelihood: Tensor
    """(B,) log p(caption | picture)."""
    information: Tensor
    """(B,) pointwise mutual information of caption and picture: sum of log p(y | x) - log p(y) over its tokens."""
    lengths: Tensor
    """(B,) tokens, the one that ends a caption among them."""


class _Guide:
    """Reads the text of a generate call without its picture too, and mixes what comes of it."""

    def __init__(self, method: GuidedCaptioning, found: Captioner, lm: Any) -> None:
        self.method, self.captioner, self.lm = method, found, lm
        self.forward = found.writer.forward
        self._signature = inspect.signature(self.forward)
        self._text: _Text | None = None
        self.guided = self.passes = self.null_passes = self.lm_passes = 0

    @contextmanager
    def text(self, call: dict[str, Any]) -> Iterator[None]:
        """Guide what is generated inside."""
        if call.get("guidance_scale") not in (None, 1, 1.0):
            raise InputError("GuidedCaptioning is guidance already: leave out guidance_scale.")
        if call.get("prefill_chunk_size") is not None:
            raise InputError("GuidedCaptioning reads a prompt at once: leave out prefill_chunk_size.")
        before, self._text = self._text, _Text(*self._instead(call))
        try:
            yield
        finally:
            self._text = before

    def _instead(self, call: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Pictures (M, …) that are read in the place of the one described, and their features where they are known."""
        method, kind = self.method, self.captioner.kind
        if method.way != "pictures":
            return None, None
        shown = call.get("pixel_values", call.get("inputs") if kind == "encoder" else None)
        if not isinstance(shown, Tensor):
            raise InputError("GuidedCaptioning needs the pixel_values of the pictures: pass them to generate.")
        if method.null == "grey":
            # Pictures are normalised: 0 is the mean of those that the model was trained on.
            pictures = torch.zeros_like(shown[:1])
        else:
            others: Any = method.pictures
            pictures = others.to(shown)
            pictures = pictures.mean(0, keepdim=True) if method.null == "mean" else pictures
        if pictures.shape[1:] != shown.shape[1:]:
            raise InputError(
                f"The other pictures are {tuple(pictures.shape[1:])}, and those to describe {tuple(shown.shape[1:])}."
            )
        return pictures, self.captioner.features(pictures)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._text is None:
            return self.forward(*args, **kwargs)
        bound = by_name(self._signature, args, kwargs)
        as_tuple = bound.pop("return_dict", None) is False
        if not isinstance(bound.get(self.captioner.tokens), Tensor):
            raise InputError("GuidedCaptioning reads tokens on both sides: pass input_ids, not embeddings.")
        past = bound.get("past_key_values")
        text = self._text
        if past is not None and past.get_seq_length() > 0:
            beside = followers(past)
            if not beside:
                raise InputError("This cache was not filled under guidance: leave out past_key_values.")
        else:
            beside = [_Beside(Side(1 if text.pictures is None else len(text.pictures)))]
            text.prompt = text.prompt or bound[self.captioner.tokens].shape[1]
        own = self.forward(**bound, return_dict=True)
        c, u, q = self.sides(beside[0], bound, own.logits)
        guided = self.method.combine(c, u, q)
        self.passes += 1
        self.guided += guided.shape[0]
        rest = own.logits[:, : own.logits.shape[1] - guided.shape[1]].float().log_softmax(-1)
        own["logits"] = own.logits = torch.cat([rest, guided], dim=1) if rest.shape[1] else guided
        if own.get("past_key_values") is not None:
            follow(own.past_key_values, beside)
        return own.to_tuple() if as_tuple else own

    def sides(self, beside: _Beside, bound: dict[str, Any], logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities with the picture, without it, and the language model's, each (B, places, V), float32.

        They are those of the last places of the call, as many as every side has.
        """
        text, method = self._text, self.method
        assert text is not None
        device = logits.device
        ids = bound[self.captioner.tokens]
        nulls = beside.null.read(
            self.captioner, self.forward, bound, text.prompt, method.way, text.seen, text.pictures
        ).to(device)
        self.null_passes += 1
        u = nulls.float().log_softmax(-1)
        if method.null == "others":
            u = beside.marginal(u.unflatten(0, (len(ids), -1)), ids, text.prompt)
        c = logits.float().log_softmax(-1)
        q = self._language(beside, ids, text.prompt)
        places = min(side.shape[1] for side in (c, u, q) if side is not None)
        c, u = c[:, -places:], u[:, -places:]
        return c, u, None if q is None else q[:, -places:].to(device)

    def _language(self, beside: _Beside, ids: Tensor, prompt: int) -> Tensor | None:
        """The language model's log-probabilities of the caption, in the captioner's tokens."""
        if self.lm is None:
            return None
        method = self.method
        table = None if method.lm_tokens is None else torch.tensor(method.lm_tokens, device=ids.device)
        fresh = beside.lm.cache is None
        ids = ids[:, prompt - 1 :] if fresh else ids
        if table is not None:
            ids = table[ids]
            if bool((ids[:, 1:] < 0).any()):
                raise InputError("A token of the caption has no counterpart in lm_tokens.")
        if fresh and (method.lm_prompt or bool((ids[:, :1] < 0).any())):
            before = tokenizer_of(self.lm)(method.lm_prompt or " ", return_tensors="pt", add_special_tokens=False)
            written = before.input_ids.to(ids)
            ids = torch.cat([written.expand(len(ids), -1), ids[:, 1:]], dim=1)
        out = self.lm(input_ids=ids.to(self.lm.device), past_key_values=beside.lm.cache, use_cache=True)
        beside.lm.cache = out.past_key_values
        self.lm_passes += 1
        q: Tensor = out.logits.float().log_softmax(-1)
        if table is not None:
            q = q[..., table.clamp_min(0).to(q.device)].masked_fill((table < 0).to(q.device), -math.inf)
        return q

    @torch.no_grad()
    def judge(self, sequences: Tensor, inputs: dict[str, Any]) -> CaptionScores:
        """Scores of captions: the whole of each is read at once, inside generate, which prepares the inputs."""
        found: list[CaptionScores] = []
        model = self.captioner.model

        def reading(writer: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
            start = input_ids.shape[1]
            whole = sequences.to(input_ids.device)
            if whole.shape[1] <= start or len(whole) != len(input_ids):
                raise InputError(f"Pass the {len(input_ids)} sequences that generate returned, with their prompt.")
            config = prepared["generation_config"]
            names = (
                "logits_processor",
                "stopping_criteria",
                "generation_config",
                "streamer",
                "synced_gpus",
                "assistant_model",
            )
            kwargs = {name: value for name, value in prepared.items() if name not in names}
            read = whole[:, :-1]
            more = read.shape[1] - start
            if isinstance(mask := kwargs.get("attention_mask"), Tensor) and mask.shape == input_ids.shape:
                kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), more)], dim=1)
            if isinstance(places := kwargs.get("position_ids"), Tensor):
                following = places[..., -1:] + torch.arange(1, more + 1, device=places.device)
                kwargs["position_ids"] = torch.cat([places, following], dim=-1)
            kwargs.update(past_key_values=None, use_cache=False, is_first_iteration=True)
            bound = writer.prepare_inputs_for_generation(read, **kwargs)
            bound = {
                name: value
                for name, value in bound.items()
                if value is not None and name not in {"logits_to_keep", "is_first_iteration"}
            }
            text = self._text
            assert text is not None
            text.prompt = start
            out = self.forward(**bound, return_dict=True)
            beside = _Beside(Side(1 if text.pictures is None else len(text.pictures)))
            c, u, q = self.sides(beside, bound, out.logits)
            found.append(_judged(self.method.combine(c, u, q), c, u, whole[:, start:], config))
            return whole

        with self.text(inputs):
            model.generate(**inputs, custom_generate=reading, max_new_tokens=max(sequences.shape[1], 1))
        return found[0]


def _judged(guided: Tensor, c: Tensor, u: Tensor, written: Tensor, config: Any) -> CaptionScores:
    """Scores of captions `written` (B, tokens) from the log-probabilities of the places before each, (B, …, V)."""
    ends = torch.as_tensor(config.eos_token_id if config.eos_token_id is not None else -1).flatten().to(written.device)
    over = torch.isin(written, ends).long().cumsum(1)
    inside = (over - torch.isin(written, ends).long()) == 0

    def taken(scores: Tensor) -> Tensor:
        return scores[:, -written.shape[1] :].gather(-1, written[..., None])[..., 0].masked_fill(~inside, 0.0)

    with_picture, without = taken(c), taken(u)
    return CaptionScores(taken(guided), with_picture.sum(1), (with_picture - without).sum(1), inside.sum(1))


_OF_THE_LOOP = {
    "logits_processor", "stopping_criteria", "generation_config", "streamer", "synced_gpus", "assistant_model",
    "cache_position",
}  # fmt: skip


@dataclass
class _Text:
    """What is the same for all tokens of a generate call."""

    pictures: Tensor | None
    seen: Tensor | None
    prompt: int = 0


@dataclass
class _Beside:
    """What goes along with the cache of a guided text."""

    null: Side
    lm: Side = field(default_factory=Side)
    gained: Tensor | None = None
    """(B, M, tokens) log-probability of every token of the caption with each other picture."""
    last: Tensor | None = None
    """(B, M, places, V) log-probabilities of the last call."""

    def marginal(self, scores: Tensor, ids: Tensor, prompt: int) -> Tensor:
        """Log of the mean over M pictures, each weighted by how well it explains the caption so far: (B, places, V).

        u_t = logsumexp_m(l_m + c_m) - logsumexp_m l_m with l_m = sum_{s < t} log p(y_s | y_<s, x_m), which is the exact
        p(y_t | y_<t) of captions of a picture that is drawn from these. scores: (B, M, places, V); ids: (B, places).
        """
        if self.gained is None:
            scores = scores[:, :, prompt - 1 - ids.shape[1] :]
            ids = ids[:, prompt:]
            self.gained, before = scores.new_zeros(*scores.shape[:2], 0), scores[:, :, :-1]
        else:
            assert self.last is not None
            before = torch.cat([self.last[:, :, -1:], scores[:, :, :-1]], dim=2)
        index = ids[:, None, :, None].expand(-1, scores.shape[1], -1, -1)
        fresh = before.gather(-1, index)[..., 0]
        self.gained = torch.cat([self.gained, fresh], dim=2)
        self.last = scores
        # The prefix of place i is the caption up to and with its own token.
        sums = torch.cat([self.gained.new_zeros(*self.gained.shape[:2], 1), self.gained.cumsum(2)], dim=2)
        explained = sums[:, :, -scores.shape[2] :, None]
        return (explained + scores).logsumexp(1) - explained.logsumexp(1)

    def crop(self, count: int) -> None:
        """As transformers' caches: the last -`count` tokens go."""
        self.null.crop(count)
        self.lm.crop(count)
        if self.gained is not None and self.last is not None and count < 0:
            self.gained, self.last = self.gained[:, :, :count], self.last[:, :, :count]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of beams."""
        self.null.reorder_cache(beam_idx)
        self.lm.reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows only."""
        self.null.batch_select_indices(indices)
        self.lm.batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        self.null.batch_repeat_interleave(repeats)
        self.lm.batch_repeat_interleave(repeats)
        if self.gained is not None:
            self._rows(torch.arange(len(self.gained)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Nothing is read."""
        self.null.reset()
        self.lm.reset()
        self.gained = self.last = None

    def _rows(self, indices: Tensor) -> None:
        if self.gained is not None and self.last is not None:
            self.gained, self.last = (rows[indices.to(rows.device)] for rows in (self.gained, self.last))
