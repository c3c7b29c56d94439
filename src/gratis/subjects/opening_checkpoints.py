"""Opening what can be merged, and telling the tensors that are one and the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from gratis.contract.errors import FileError
from gratis.subjects.adapters import AdaptedCheckpoint, is_adapter
from gratis.subjects.checkpoints import PIPELINE, Checkpoint, TensorSource


def open_checkpoint(source: str | os.PathLike[str], base: TensorSource | None = None) -> TensorSource:
    """The checkpoint at `source`: a safetensors file or folder, a diffusers pipeline, a GGUF file, or a PEFT adapter.

    An adapter is read as `base` with the adapter merged in; `MODEL+ADAPTER` names the model it belongs to. What an
    adapter's own file says about its model is not followed. Raises FileError.
    """
    path = Path(source).expanduser()
    if "+" in str(source) and not path.exists():
        model, _, adapter = str(source).rpartition("+")
        return AdaptedCheckpoint(open_checkpoint(model, base), adapter)
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.is_dir():
        if is_adapter(path):
            if base is None:
                raise FileError(f"{path} is an adapter: name the base it belongs to, or write MODEL+ADAPTER.")
            return AdaptedCheckpoint(base, path)
        files = sorted(path.glob("*.gguf"))
        if files and not any(path.glob("*.safetensors")) and not (path / PIPELINE).is_file():
            if len(files) > 1:
                raise FileError(f"{path} holds {len(files)} GGUF files: name one of them.")
            return _gguf(files[0])
    return Checkpoint(path)


def _gguf(path: Path) -> TensorSource:
    from gratis.subjects.gguf_checkpoint import GGUFCheckpoint

    return GGUFCheckpoint(path)


def drop_tied(sources: list[Any]) -> None:
    """Where a model ties its head to its embedding, and files hold the one matrix under both names, keep the embedding's.

    It is then merged once, in every checkpoint, and the result is tied again.
    """
    tied = [source for source in sources if source.config().get("tie_word_embeddings")]
    if not tied:
        return
    for source in sources:
        for name in [name for name in source.places if name.endswith(("lm_head.weight", "embed_out.weight"))]:
            twin = next(
                (
                    other
                    for other, place in source.places.items()
                    if other != name
                    and place.shape == source.places[name].shape
                    and any(word in other for word in ("embed", "wte"))
                    and not other.endswith("embed_out.weight")
                ),
                None,
            )
            if twin is not None and torch.equal(source.tensor(name), source.tensor(twin)):
                source.places = {key: place for key, place in source.places.items() if key != name}
