"""Reading a text without the picture that it describes: how a null branch is asked of each class of image-to-text model.

- "encoder": an encoder-decoder that takes pixel values (VisionEncoderDecoderModel);
- "cross": a text decoder of its own that looks at picture features (BLIP);
- "placeholder": picture tokens stand in the prompt (LLaVA and its like);
- "prefix": picture features go before the text without tokens of their own (GIT);
- "text": no picture at all; the condition is the prompt, without which only its last token is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.errors import InputError, SubjectError
from gratis.subjects.generate_door import check_generates

Kind = Literal["encoder", "cross", "placeholder", "prefix", "text"]
Null = Literal["zeros", "absent", "pictures"]
NULL_IMAGE = "null_image"
"""Entry of a model's configuration: what it was shown in training in the place of a picture; "zeros" for features."""
_TEXT = {
    "input_ids", "decoder_input_ids", "attention_mask", "decoder_attention_mask", "position_ids", "token_type_ids",
    "use_cache", "logits_to_keep", "is_decoder", "encoder_outputs", "encoder_hidden_states",
}  # fmt: skip
"""Arguments of a forward pass that a reading without the picture has too; whatever else there is could be the picture."""


@dataclass(frozen=True)
class Captioner:
    """An image-to-text model and where its pictures enter."""

    model: Any
    kind: Kind
    writer: Any
    """The module whose forward pass generate calls for every token."""

    @property
    def tokens(self) -> str:
        """The argument of a forward pass that has the text."""
        return "decoder_input_ids" if self.kind == "encoder" else "input_ids"

    def check_null(self, null: Null, method: str) -> None:
        """Raise SubjectError where a model cannot be read in this way."""
        name = type(self.model).__name__
        if self.kind == "text" and null != "absent":
            raise SubjectError(f"{method}: {name} takes no pictures; null='absent' leaves out its prompt instead.")
        if self.kind == "prefix" and null == "zeros":
            raise SubjectError(
                f"{method}: {name} puts picture features before the text by itself, so they cannot be set to zero: use "
                "null='absent', or another picture."
            )
        if null == "absent" and self.kind == "encoder" and not hasattr(self.model, "decoder"):
            raise SubjectError(
                f"{method}: {name} has no decoder of its own to read without pictures: use null='zeros'."
            )

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor | None:
        """What the text looks at (pictures, places, width), where it is known before the text; None elsewhere."""
        if self.kind == "encoder":
            found: Tensor = self.model.get_encoder()(pixel_values=pictures).last_hidden_state
            return found
        if self.kind == "cross":
            seen: Tensor = self.model.vision_model(pixel_values=pictures)[0]
            return seen
        return None


def captioner(subject: Any, method: str) -> Captioner:
    """How `subject` takes pictures. Raises SubjectError for what generates no text, or hides how it sees."""
    model = check_generates(subject, method)
    from transformers import GenerationMixin

    if model.config.is_encoder_decoder:
        if getattr(model, "main_input_name", "") != "pixel_values":
            raise SubjectError(
                f"{method} acts on encoder-decoders that look at pictures; {type(model).__name__} reads something else."
            )
        return Captioner(model, "encoder", model)
    if type(model).generate is not GenerationMixin.generate:
        parts: list[Any] = [part for part in model.children() if isinstance(part, GenerationMixin)]
        writers = [part for part in parts if "encoder_hidden_states" in inspect.signature(part.forward).parameters]
        if len(writers) == 1 and hasattr(model, "vision_model"):
            return Captioner(model, "cross", writers[0])
        raise SubjectError(
            f"{method} cannot read {type(model).__name__} without its picture: it generates in a way of its own, from "
            "embeddings in which the picture cannot be told from the text."
        )
    if picture_token(model) is not None:
        return Captioner(model, "placeholder", model)
    if "pixel_values" in inspect.signature(model.forward).parameters:
        return Captioner(model, "prefix", model)
    if "past_key_values" not in inspect.signature(model.forward).parameters or _keeps_its_state(model):
        raise SubjectError(
            f"{method} reads a text twice, with keys and values of its own for each reading; {type(model).__name__} keeps "
            "a state of another kind."
        )
    return Captioner(model, "text", model)


@torch.no_grad()
def _keeps_its_state(model: Any) -> bool:
    """Whether a model gives no cache back after it has read a token."""
    read = model(input_ids=torch.ones(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    return getattr(read, "past_key_values", None) is None


def picture_token(model: Any) -> int | None:
    """The id that stands for a piece of a picture in a prompt."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(found := getattr(model.config, name, None), int):
            return found
    return None


@dataclass
class Side:
    """A second reading of the text: its cache, and what belongs to its rows.

    Each row of the text is read `copies` times: row r of it by rows r * copies … of this side.
    """

    copies: int = 1
    cache: Any = None
    hidden: Tensor | None = None
    """(rows, prompt) True at places of the prompt that are not looked at."""

    def read(
        self, captioner: Captioner, forward: Callable[..., Any], bound: dict[str, Any], prompt: int, null: Null,
        seen: Tensor | None, pictures: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Logits (rows * copies, places, V) of the text of a call without its picture; fewer places than were asked for
        a prompt that is left out.

        `seen` is the features of `pictures` (copies, …) that stand in its place, where they are known; `prompt` the
        number of tokens of the prompt.
        """
        fresh = self.cache is None
        ids = bound[captioner.tokens].repeat_interleave(self.copies, dim=0)
        given = {name: value for name, value in bound.items() if name in _TEXT}
        for name in ("attention_mask", "decoder_attention_mask", "position_ids", "token_type_ids"):
            if isinstance(value := given.get(name), Tensor) and value.shape[0] * self.copies == len(ids):
                given[name] = value.repeat_interleave(self.copies, dim=0)
        if "logits_to_keep" in given:
            given["logits_to_keep"] = ids.shape[1] - (prompt - 1 if fresh else 0)
        rows = len(ids) // self.copies
        if pictures is not None:
            pictures = pictures.repeat(rows, *(1 for _ in pictures.shape[1:]))
        if seen is not None:
            seen = seen.repeat(rows, 1, 1)
        given[captioner.tokens] = ids
        reading = {
            "encoder": self._encoder, "cross": self._cross, "placeholder": self._placeholder, "prefix": self._prefix,
            "text": self._text,
        }[captioner.kind]  # fmt: skip
        call, given = reading(captioner, forward, given, fresh, prompt, null, seen, pictures)
        out = call(**given, past_key_values=self.cache, return_dict=True)
        self.cache = out.get("past_key_values")
        return out.logits  # type: ignore[no-any-return]

    def _encoder(
        self, captioner: Captioner, forward: Any, given: dict[str, Any], fresh: bool, prompt: int, null: Null,
        seen: Tensor | None, pictures: Tensor | None,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        from transformers.modeling_outputs import BaseModelOutput

        own = given.pop("encoder_outputs")
        if null == "absent":
            named = {"input_ids": given["decoder_input_ids"], "attention_mask": given.get("decoder_attention_mask")}
            return captioner.model.decoder, {**named, "use_cache": given.get("use_cache")}
        seen = torch.zeros_like(own[0]).repeat_interleave(self.copies, dim=0) if seen is None else seen
        # The mask of an encoder is that of the picture, which is another one here.
        given.pop("attention_mask", None)
        return forward, {**given, "encoder_outputs": BaseModelOutput(last_hidden_state=seen)}

    def _cross(
        self, captioner: Captioner, forward: Any, given: dict[str, Any], fresh: bool, prompt: int, null: Null,
        seen: Tensor | None, pictures: Tensor | None,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        own = given["encoder_hidden_states"]
        if null == "absent":
            seen = None
        elif seen is None:
            seen = torch.zeros_like(own).repeat_interleave(self.copies, dim=0)
        mask = None if seen is None else torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        return forward, {**given, "encoder_hidden_states": seen, "encoder_attention_mask": mask}

    def _placeholder(
        self, captioner: Captioner, forward: Any, given: dict[str, Any], fresh: bool, prompt: int, null: Null,
        seen: Tensor | None, pictures: Tensor | None,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        ids = given["input_ids"]
        places = ids == picture_token(captioner.model)
        places[:, prompt if fresh else 0 :] = False
        if null == "pictures":
            return forward, {**given, "pixel_values": pictures} if fresh else given
        if null == "zeros":
            if fresh:
                embedded = captioner.model.get_input_embeddings()(ids)
                given.pop("input_ids")
                given["inputs_embeds"] = embedded.masked_fill(places[..., None], 0)
            return forward, given
        if fresh:
            self.hidden = places
        mask = given.get("attention_mask")
        past = 0 if self.cache is None else self.cache.get_seq_length()
        if mask is None:
            mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long, device=ids.device)
        if mask.dim() != 2:
            raise InputError("Guidance needs a padding mask of (batch, tokens): leave out cache_implementation.")
        assert self.hidden is not None
        mask = mask.clone()
        mask[:, : self.hidden.shape[1]].masked_fill_(self.hidden, 0)
        # The text counts its places as if the picture had never been there.
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return forward, {**given, "attention_mask": mask, "position_ids": positions}

    def _prefix(
        self, captioner: Captioner, forward: Any, given: dict[str, Any], fresh: bool, prompt: int, null: Null,
        seen: Tensor | None, pictures: Tensor | None,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        if null == "pictures":
            return forward, {**given, "pixel_values": pictures} if fresh else given
        mask = given.pop("attention_mask", None)
        if isinstance(mask, Tensor) and not bool(mask.all()):
            raise InputError(
                f"{type(captioner.model).__name__} is read without its picture in batches of equal prompts."
            )
        given.pop("position_ids", None)
        return forward, given

    def _text(
        self, captioner: Captioner, forward: Any, given: dict[str, Any], fresh: bool, prompt: int, null: Null,
        seen: Tensor | None, pictures: Tensor | None,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        # Of the prompt only its last token is read: a text has to begin somewhere.
        ids = given["input_ids"][:, prompt - 1 :] if fresh else given["input_ids"]
        return forward, {"input_ids": ids, "use_cache": given.get("use_cache")}

    def crop(self, count: int) -> None:
        """As transformers' caches."""
        if self.cache is not None:
            self.cache.crop(min(count, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of beams."""
        if self.cache is not None:
            self.cache.reorder_cache(self.rows(beam_idx))
        if self.hidden is not None:
            self.hidden = self.hidden[self.rows(beam_idx).to(self.hidden.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        if self.cache is not None:
            old = torch.arange(self.cache_rows() // self.copies).repeat_interleave(repeats)
            self.batch_select_indices(old)

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows only."""
        if self.cache is not None:
            self.cache.batch_select_indices(self.rows(indices))
        if self.hidden is not None:
            self.hidden = self.hidden[self.rows(indices).to(self.hidden.device)]

    def reset(self) -> None:
        """Nothing is read."""
        self.cache = self.hidden = None

    def rows(self, indices: Tensor) -> Tensor:
        """The rows of this side for rows of the text."""
        copies = torch.arange(self.copies, device=indices.device)
        return (indices[:, None] * self.copies + copies).flatten()

    def cache_rows(self) -> int:
        """Rows of the cache."""
        own = getattr(self.cache, "self_attention_cache", self.cache)
        return int(own.layers[0].keys.shape[0])
