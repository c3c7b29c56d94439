"""Embeddings that are not learned: each token is the picture of how it is written.

A. Bochkov, "Emergent Semantics Beyond Token Embeddings: Transformer LMs with Frozen Visual Unicode Representations",
2025: tokens are drawn with a font, the bitmaps centred and rotated by a PCA that drops nothing, and scaled to unit
length. Models that are trained on such a table never change it, so that all of them have the same one.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.contract.errors import FileError, InputError, MissingExtraError

SEED = 42
INK = 128
"""Below it a pixel is ink."""


@dataclass(frozen=True)
class Jitter:
    """How far a drawing is turned and moved, and how much of it is spotted."""

    degrees: float
    shift: int
    """Pixels, in both directions."""
    spots: float
    """Share of the pixels that become ink."""
    blur: float


DRAWN = {32: Jitter(4.0, 2, 0.01, 0.5), 64: Jitter(7.0, 3, 0.03, 0.5)}
"""By the cell's pixels: text in Latin, Greek, Cyrillic or Armenian letters."""
UNTURNED = Jitter(0.0, 0, 0.001, 0.0)
"""All other text."""
ALPHABETS = (
    (0x0000, 0x024F), (0x0370, 0x058F), (0x1C80, 0x1C8F), (0x1E00, 0x1FFF), (0x2C60, 0x2C7F), (0x2DE0, 0x2DFF),
    (0xA640, 0xA69F), (0xA720, 0xA7FF),
)  # fmt: skip
"""Blocks of Unicode with Latin, Greek, Cyrillic and Armenian letters."""


@dataclass(frozen=True)
class Glyphs:
    """A table of embeddings, and what is to be known about it."""

    embeddings: Tensor
    """(tokens, width) float32, rows of unit length."""
    bitmaps: NDArray[np.bool_]
    """(tokens, cell, cell), True where ink is."""
    missing: tuple[str, ...]
    """Tokens with a character that the font does not have."""
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of tokens with the same bitmap, which no model on this table can tell apart."""


def glyph_embeddings(
    tokens: Sequence[str] | Any,
    font: str | os.PathLike[str] | None = None,
    *,
    cell: int = 32,
    width: int | None = None,
    written: Mapping[str, str] | None = None,
    covered: float = 0.99,
) -> Glyphs:
    """The frozen embedding table of `tokens`: strings in the order of their ids, or a tokenizer.

    `font` is a font file (the paper's is GNU Unifont at 32 pixels, whose drawings are the closest to the authors'); None
    is the font that comes with Pillow, which has Latin letters only. `cell` is the pixels of a character's side, 32 or
    64; rows have `cell` * `cell` numbers, or `width`, where that loses nothing. `written` says how tokens without a
    shape of their own are drawn, for example a newline. `covered` is the least share of tokens that the font must have.

    Raises InputError for fewer than two tokens, a `width` that would drop something, and a font that lacks too many
    characters, naming the first; FileError for a font that cannot be read; MissingExtraError without Pillow.
    """
    if hasattr(tokens, "get_vocab"):
        ids: dict[str, int] = tokens.get_vocab()
        tokens = [token for token, _ in sorted(ids.items(), key=lambda item: item[1])]
    if len(tokens) < 2:
        raise InputError("A table of glyphs needs at least two tokens.")
    if cell not in DRAWN:
        raise InputError(f"Glyphs are drawn in cells of 32 or 64 pixels, not {cell}.")
    texts = [(written or {}).get(token, token) for token in tokens]
    pen = _Pen(font, cell)
    bitmaps = np.stack([pen.bitmap(text) for text in texts])
    missing = tuple(token for token, text in zip(tokens, texts, strict=True) if not pen.has(text))
    if len(missing) > (1 - covered) * len(tokens):
        raise InputError(
            f"The font {pen.name} lacks {len(missing):,} of {len(tokens):,} tokens, the first of them "
            f"{', '.join(repr(token) for token in missing[:5])}: name one that has them, such as GNU Unifont."
        )
    ordered = bitmaps.reshape(len(tokens), -1)[:, polar_order(cell)]
    return Glyphs(principal_rows(ordered, width), bitmaps, missing, _duplicates(tokens, bitmaps))


def polar_order(cell: int) -> NDArray[np.int64]:
    """The pixels (cell * cell,) of a bitmap in row order, sorted by (distance from the middle, angle, x, y)."""
    y, x = np.divmod(np.arange(cell * cell), cell)
    dx, dy = x - cell // 2, y - cell // 2
    return np.lexsort((y, x, np.arctan2(dy, dx), dx * dx + dy * dy))


def principal_rows(pixels: NDArray[np.bool_], width: int | None = None) -> Tensor:
    """Rows (tokens, width) of unit length: `pixels` (tokens, numbers) centred and turned to their principal axes.

    All axes are kept, in falling order of variance; the entry of each that is largest without its sign is positive.
    Axes without variance are zeros. Raises InputError where `width` has no room for all others.
    """
    tokens, numbers = pixels.shape
    count = min(tokens, numbers)
    if tokens > numbers:
        # Counts of ink up to 2 ** 24 are exact in float32, and the matrix of pixels is read once.
        flat = torch.from_numpy(pixels).float()
        together, mean = (flat.T @ flat).double(), flat.double().mean(0)
        variances, axes = torch.linalg.eigh(together - tokens * torch.outer(mean, mean))
        variances, axes = variances.flip(0).clamp_min(0), axes.flip(1)
    else:
        centred = torch.from_numpy(pixels).double()
        mean = centred.mean(0)
        _, scales, rows = torch.linalg.svd(centred - mean, full_matrices=False)
        variances, axes = scales.square(), rows.T
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    rank = int((variances > variances[0] * 1e-12).sum())
    if width is not None and width < rank:
        raise InputError(f"These glyphs differ along {rank} axes, which a width of {width} cannot hold: name {rank}.")
    found = torch.zeros(tokens, width or numbers, dtype=torch.float64)
    kept = min(count, rank)
    for start in range(0, tokens, 8192):
        part = torch.from_numpy(pixels[start : start + 8192]).double() - mean
        found[start : start + 8192, :kept] = part @ axes[:, :kept]
    lengths = found.norm(dim=1, keepdim=True)
    if bool((lengths == 0).any()):
        raise InputError("A glyph is the mean of all others and has no direction: all tokens are drawn alike.")
    unit: Tensor = (found / lengths).float()
    return unit


class _Pen:
    """Draws text with a font, one cell per character."""

    def __init__(self, font: str | os.PathLike[str] | None, cell: int) -> None:
        try:
            from PIL import ImageFont
        except ImportError:
            raise MissingExtraError.of("pillow", "diffusion") from None
        try:
            self._font: Any = ImageFont.load_default(cell) if font is None else ImageFont.truetype(font, cell)
        except OSError as error:
            raise FileError(f"{font} cannot be read as a font: {error}.") from error
        self.name = "that comes with Pillow" if font is None else os.fspath(font)
        self._cell = cell
        # What a font draws in the place of characters that it does not have.
        self._blank = {self._shape(letter) for letter in ("\uffff", "\U0010ffff")}

    def has(self, text: str) -> bool:
        """Whether every character of `text` has a glyph; spaces need none."""
        return all(letter == " " or self._shape(letter) not in self._blank for letter in text)

    @functools.cache  # noqa: B019
    def _shape(self, letter: str) -> tuple[tuple[int, int], bytes]:
        mask = self._font.getmask(letter)
        return mask.size, bytes(mask)

    def bitmap(self, text: str) -> NDArray[np.bool_]:
        """(cell, cell), True where ink is; longer text is squeezed."""
        from PIL import Image, ImageChops, ImageDraw, ImageFilter

        cell = self._cell
        picture: Any = Image.new("L", (cell * max(len(text), 1), cell), 255)
        draw = ImageDraw.Draw(picture)
        for place, letter in enumerate(text):
            left, top, right, bottom = self._font.getbbox(letter)
            corner = (cell * place + (cell - right - left) // 2, (cell - bottom - top) // 2)
            draw.text(corner, letter, fill=0, font=self._font)
        jitter = DRAWN[cell] if all(_in_alphabets(letter) for letter in text) else UNTURNED
        angle, shift, spots = _drawn(jitter, picture.size)
        if jitter.degrees:
            picture = picture.rotate(angle, Image.Resampling.BILINEAR, fillcolor=255)
        if jitter.shift:
            moved = Image.new("L", picture.size, 255)
            moved.paste(picture, shift)
            picture = moved
        picture = ImageChops.darker(picture, Image.fromarray(spots))
        if jitter.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(jitter.blur))
        ink = np.asarray(picture) < INK
        if picture.width > cell:
            squeezed = Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).resize(
                (cell, cell), Image.Resampling.BILINEAR
            )
            ink = np.asarray(squeezed) < INK
        return ink


@functools.lru_cache(maxsize=64)
def _drawn(jitter: Jitter, size: tuple[int, int]) -> tuple[float, tuple[int, int], NDArray[np.uint8]]:
    """Angle, shift and spots (0 where a pixel becomes ink), from the same seed for every token."""
    generator = np.random.default_rng(SEED)
    angle = float(generator.uniform(-jitter.degrees, jitter.degrees))
    across, down = (int(number) for number in generator.integers(-jitter.shift, jitter.shift + 1, 2))
    spots = np.where(generator.random((size[1], size[0])) < jitter.spots, 0, 255).astype(np.uint8)
    return angle, (across, down), spots


def _in_alphabets(letter: str) -> bool:
    return any(first <= ord(letter) <= last for first, last in ALPHABETS)


def _duplicates(tokens: Sequence[str], bitmaps: NDArray[np.bool_]) -> tuple[tuple[str, ...], ...]:
    groups: dict[bytes, list[str]] = {}
    for token, bitmap in zip(tokens, bitmaps, strict=True):
        groups.setdefault(np.packbits(bitmap).tobytes(), []).append(token)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


CODE_POINTS = ((0x0000, 0xD7FF), (0xF900, 0xFFFE))
SPECIAL = (0xE000, 0xE0FF)
GRAMS = ((0xD800, 0xDFFF), (0xE100, 0xF8FF))
SHARED = (0x10000, 0x1FFFF)
NAMED = ("<pad>", "<s>", "</s>", "<unk>", "<think>", "</think>", "[INST]", "[/INST]", "<fim_prefix>", "<fim_middle>",
         "<fim_suffix>")  # fmt: skip


def frequent_grams(texts: Iterable[str], lengths: Sequence[int] = (2, 3), top: int = 338) -> set[str]:
    """The `top` most frequent strings of each of `lengths` characters, of each text (one per language)."""
    found: set[str] = set()
    for text in texts:
        for length in lengths:
            counts = Counter(text[start : start + length] for start in range(len(text) - length + 1))
            ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            found.update(gram for gram, _ in ranked[:top])
    return found


def unicode_vocabulary(grams: Iterable[str], shared: Iterable[str] = ()) -> list[str]:
    """A vocabulary in which a character's id is its code point: 65,536 strings, or 131,072 with `shared` ones.

    Strings of several characters stand where Unicode has surrogates and private characters, longest first and then in
    alphabetic order; ids without use are `<unused_i>`. Only eleven of the authors' special tokens have known names, the
    others are `<special_i>`. Raises InputError for more strings than there are places.
    """
    grams, shared = sorted(set(grams), key=lambda gram: (-len(gram), gram)), list(shared)
    every: list[str] = [f"<unused_{number}>" for number in range(SHARED[1] + 1 if shared else SHARED[0])]
    for first, last in CODE_POINTS:
        every[first : last + 1] = [chr(number) for number in range(first, last + 1)]
    for number in range(SPECIAL[0], SPECIAL[1] + 1):
        place = number - SPECIAL[0]
        every[number] = NAMED[place] if place < len(NAMED) else f"<special_{place}>"
    places = [number for first, last in GRAMS for number in range(first, last + 1)]
    for given, room, what in ((grams, places, "n-grams"), (shared, range(SHARED[0], SHARED[1] + 1), "shared strings")):
        if len(given) > len(room):
            raise InputError(f"The vocabulary has places for {len(room):,} {what}, and there are {len(given):,}.")
        for number, string in zip(room, given, strict=False):
            every[number] = string
    if len(set(every)) != len(every):
        twice = next(token for token, times in Counter(every).items() if times > 1)
        raise InputError(f"The vocabulary would have {twice!r} twice: leave it out of the strings.")
    return every


def unicode_tokenizer(vocabulary: Sequence[str]) -> Any:
    """A PreTrainedTokenizerFast over `unicode_vocabulary`: byte-pair merges without normaliser or pre-tokenizer.

    Every split of every n-gram whose halves are tokens is a merge, in the order of the ids.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate(vocabulary)}
    grams = [vocabulary[number] for first, last in GRAMS for number in range(first, last + 1)]
    shared = [token for token in vocabulary[SHARED[0] :] if len(token) > 1 and not token.startswith("<unused_")]
    merges = [
        (gram[:cut], gram[cut:])
        for gram in [*(gram for gram in grams if not gram.startswith("<unused_")), *shared]
        for cut in range(1, len(gram))
        if gram[:cut] in ids and gram[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
