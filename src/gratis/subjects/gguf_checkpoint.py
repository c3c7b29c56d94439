"""A GGUF file read as a checkpoint: tensors by their names in transformers, dequantised block by block as they are read.

The file's table is checked against its length before anything is read. Names, configuration and tokenizer come from
transformers' own tables; what its loader does to whole tensors is done to stretches here.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.contract.errors import FileError, MissingExtraError
from gratis.subjects.checkpoints import MOST_DIMENSIONS, TensorSource
from gratis.subjects.embedded import quiet_transformers

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SHIFTED_NORMS = ("gemma2", "gemma3", "nemotron")
"""Architectures whose norms are stored plus one."""
IGNORED = ("rope_freqs", "rope_factors")
"""Tensors that transformers computes itself."""


@dataclass(frozen=True)
class BlockPlace:
    """Where a tensor's blocks are, and how they become numbers."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    """gguf's quantisation type."""
    offset: int
    block: int
    """Elements of a block."""
    block_bytes: int
    heads: int = 0
    """Heads whose rows are stored in the order of interleaved rotary embeddings; 0 where rows are in order."""
    shift: float = 0.0
    """What is subtracted."""
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.elements // self.block * self.block_bytes


class GGUFCheckpoint(TensorSource):
    """The tensors of a GGUF language model, in float32.

    Raises FileError for a damaged file or an architecture whose tensors do not correspond one to one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        try:
            import gguf
        except ImportError:
            raise MissingExtraError.of("gguf", "gguf") from None
        self._metadata, stored = read_table(self.path, gguf.GGML_QUANT_SIZES, gguf.GGMLQuantizationType)
        self._data: NDArray[np.uint8] = np.memmap(self.path, mode="r", dtype=np.uint8)
        self._dequantize: Callable[..., NDArray[np.float32]] = gguf.quants.dequantize
        self._model: Any = None
        self.places: dict[str, BlockPlace] = self._named(stored)

    def __reduce__(self) -> Any:
        # Another process maps the file itself.
        return type(self), (self.path,)

    @property
    def files(self) -> list[Path]:
        return [self.path]

    @property
    def bytes(self) -> int:
        return sum(place.bytes for place in self.places.values())

    def view(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """(count,) elements from flat index `start` on, dequantised."""
        place = self.places[name]
        end = place.elements if count is None else start + count
        if start < 0 or end > place.elements:
            raise IndexError(f"tensor {name!r} has {place.elements} elements, not {start} to {end}")
        if end <= start:
            return torch.empty(0)
        blocks = self._data[place.offset : place.offset + place.bytes].reshape(-1, place.block_bytes)
        if place.heads:
            columns = math.prod(place.shape[1:])
            first, last = start // columns, -(-end // columns)
            rows = stored_rows(np.arange(first, last), place.shape[0], place.heads)
            of_row = columns // place.block
            chosen = blocks.reshape(-1, of_row * place.block_bytes)[rows].reshape(-1, place.block_bytes)
            begin = first * columns
        else:
            first, last = start // place.block, -(-end // place.block)
            chosen, begin = blocks[first:last], first * place.block
        values = self._dequantize(np.ascontiguousarray(chosen), place.kind).reshape(-1)[start - begin : end - begin]
        if place.shift:
            values = values - np.float32(place.shift)
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=True))

    def config(self) -> dict[str, Any]:
        settings: dict[str, Any] = self._model_config().to_dict()
        return settings

    def tokenizer(self) -> dict[str, Any] | None:
        """The vocabulary as `tokenizer.json` would hold it."""
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            return None
        return {"model": {"vocab": {token: number for number, token in enumerate(tokens)}}}

    def write_description(self, folder: Path) -> None:
        """Write configuration and tokenizer, as transformers reads them from the file, into `folder`."""
        import transformers

        with quiet_transformers():
            self._model_config().save_pretrained(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            tokenizer.save_pretrained(folder)

    def _model_config(self) -> Any:
        import transformers

        if self._model is not None:
            return self._model
        with quiet_transformers():
            try:
                found = transformers.AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
            except (ValueError, KeyError, OSError, IndexError, TypeError, AttributeError) as error:
                raise FileError(f"{self.path} cannot be read as a language model: {error}") from error
        vars(found).pop("quantization_config", None)
        self._model = found
        return found

    def _named(self, stored: dict[str, BlockPlace]) -> dict[str, BlockPlace]:
        import transformers
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        architecture = self._metadata.get("general.architecture")
        if architecture in TENSOR_PROCESSORS and architecture not in ("llama", *SHIFTED_NORMS):
            raise FileError(
                f"{self.path}: the tensors of {architecture} models are stored in another form than transformers'; "
                "convert it first with gratis.open and save_pretrained."
            )
        config = self._model_config()
        with quiet_transformers(), torch.device("meta"):
            try:
                model = transformers.AutoModelForCausalLM.from_config(config)
            except (ValueError, TypeError, RuntimeError) as error:
                raise FileError(f"{self.path} describes a model that cannot be built: {error}") from error
        processor = TENSOR_PROCESSORS.get(str(architecture), TensorProcessor)(config=config.to_dict())
        names = _top_names(model, str(architecture))
        if any(name not in names and not name.startswith(IGNORED) for name in stored):
            names = get_gguf_hf_weights_map(model, processor)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        places: dict[str, BlockPlace] = {}
        for name, place in stored.items():
            if name.startswith(IGNORED):
                continue
            known = names.get(name)
            if known is None:
                raise FileError(f"{self.path}: transformers knows no name for the tensor {name!r}.")
            if known in shapes and shapes[known] != place.shape:
                raise FileError(
                    f"{self.path}: tensor {name!r} has shape {list(place.shape)}, but {known!r} has "
                    f"{list(shapes[known])}."
                )
            places[known] = self._adjusted(place, known, name, str(architecture), config)
        return places

    def _adjusted(self, place: BlockPlace, known: str, name: str, architecture: str, config: Any) -> BlockPlace:
        heads = 0
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = int(config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads)
            if heads < 1 or place.shape[0] % (2 * heads):
                raise FileError(f"{self.path}: the rows of {name!r} do not divide into {heads} heads.")
            if len(place.shape) == 1:
                raise FileError(f"{self.path}: {name!r} is a bias of permuted rows, which is not supported here.")
        shift = 1.0 if architecture in SHIFTED_NORMS and "norm.weight" in name else 0.0
        return BlockPlace(known, place.shape, place.kind, place.offset, place.block, place.block_bytes, heads, shift)


def _top_names(model: Any, architecture: str) -> dict[str, str]:
    """By a tensor's name in the file its name in the model, from gguf's tables; the quick way for most models."""
    import gguf

    kind = next((key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), None)
    if kind is None:
        return {}
    table = gguf.get_tensor_name_map(kind, model.config.get_text_config().num_hidden_layers)
    names = {}
    for known in model.state_dict():
        name, dot, suffix = known.rpartition(".")
        if suffix not in ("weight", "bias"):
            name, dot, suffix = known, "", ""
        if (short := table.get_name(name)) is not None:
            names[short + dot + suffix] = known
    return names


def stored_rows(rows: NDArray[np.int64], total: int, heads: int) -> NDArray[np.int64]:
    """Where the file has the rows that transformers numbers `rows`: halves of a head are interleaved in the file."""
    half = total // heads // 2
    head, within = np.divmod(rows, 2 * half)
    part, place = np.divmod(within, half)
    rows_there: NDArray[np.int64] = head * 2 * half + place * 2 + part
    return rows_there


class _Bytes:
    """Reads little-endian values one after the other, never beyond the end."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, length: int) -> memoryview:
        if length < 0 or self.at + length > len(self.data):
            raise FileError(f"{self.path} is truncated or damaged: it ends within its header.")
        piece = self.data[self.at : self.at + length]
        self.at += length
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        return bytes(self.take(self.number("Q"))).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY and depth < 4:
            inner, count = self.number("I"), self.number("Q")
            if inner in SCALARS:
                size = struct.calcsize(f"<{SCALARS[inner]}")
                return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(size * count)))
            if count > len(self.data) - self.at:
                raise FileError(f"{self.path} is truncated or damaged: an array of {count:,} entries does not fit.")
            return [self.value(inner, depth + 1) for _ in range(count)]
        raise FileError(f"{self.path} is damaged: it has a value of the unknown type {kind}.")


def read_table(path: Path, sizes: Any, kinds: Any) -> tuple[dict[str, Any], dict[str, BlockPlace]]:
    """Metadata and tensors of a GGUF file, checked against its length. Raises FileError.

    `sizes` is gguf's table of block sizes, `kinds` its enumeration of quantisation types.
    """
    if not path.is_file():
        raise FileError(f"There is no file {path}.")
    if path.stat().st_size < 24:
        raise FileError(f"{path} is truncated or no GGUF file.")
    whole = np.memmap(path, mode="r", dtype=np.uint8)
    source = _Bytes(path, memoryview(np.asarray(whole)))  # type: ignore[arg-type]
    if bytes(source.take(4)) != b"GGUF":
        raise FileError(f"{path} is no GGUF file.")
    version, tensors, entries = source.number("I"), source.number("Q"), source.number("Q")
    if version not in (2, 3):
        raise FileError(f"{path} is a GGUF file of version {version}; 2 and 3 can be read.")
    if tensors + entries > len(whole):
        raise FileError(f"{path} is damaged: its header counts {tensors:,} tensors and {entries:,} entries.")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = source.text()
        metadata[key] = source.value(source.number("I"))
    found = []
    for _ in range(tensors):
        name, dimensions = source.text(), source.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise FileError(f"{path}: tensor {name!r} would have {dimensions:,} dimensions.")
        shape = tuple(source.number("Q") for _ in range(dimensions))[::-1]
        found.append((name, shape, source.number("I"), source.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise FileError(f"{path}: the alignment {alignment!r} is no power of two.")
    begin = -(-source.at // alignment) * alignment
    return metadata, _block_places(path, found, begin, len(whole), sizes, kinds)


def _block_places(
    path: Path, found: list[tuple[str, tuple[int, ...], int, int]], begin: int, size: int, sizes: Any, kinds: Any
) -> dict[str, BlockPlace]:
    places: dict[str, BlockPlace] = {}
    ends: list[tuple[int, int, str]] = []
    for name, shape, number, offset in found:
        try:
            kind = kinds(number)
            block, block_bytes = sizes[kind]
        except (ValueError, KeyError):
            raise FileError(f"{path}: tensor {name!r} has the unknown type {number}.") from None
        if math.prod(max(n, 1) for n in shape) >= 2**63 or (shape[-1] if shape else 1) % block:
            raise FileError(f"{path}: tensor {name!r} of shape {list(shape)} does not fill blocks of {block}.")
        place = BlockPlace(name, shape, kind, begin + offset, block, block_bytes)
        if place.offset + place.bytes > size:
            raise FileError(f"{path} is truncated: tensor {name!r} ends at byte {place.offset + place.bytes:,}.")
        if name in places:
            raise FileError(f"{path}: tensor {name!r} is in it twice.")
        places[name] = place
        ends.append((place.offset, place.offset + place.bytes, name))
    ends.sort()
    for (_, end, one), (start, _, other) in itertools.pairwise(ends):
        if start < end:
            raise FileError(f"{path}: tensors {one!r} and {other!r} overlap.")
    return places
