"""Small trained models of the standard classes that come with gratis, and the sprite world that they know.

`load("sprites-classifier")` (or `gratis.open("zoo:sprites-classifier")`) returns the ecosystem's own object: a diffusers
pipeline or model, or a transformers model. `names()` lists those that are trained; each folder under `weights/` has a
README.md with data, figures and the command that trains the model anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gratis.contract.errors import FileError, MissingExtraError, SubjectError, UnknownNameError

_WEIGHTS = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """The models that came with this installation, sorted."""
    return tuple(sorted(folder.name for folder in _WEIGHTS.iterdir() if (folder / "README.md").is_file()))


def folder_of(name: str) -> Path:
    """The folder of a model's weights, config and card. Raises UnknownNameError that suggests the nearest name."""
    known = names() if _WEIGHTS.is_dir() else ()
    if name not in known:
        raise UnknownNameError.among("zoo model", name, known)
    return _WEIGHTS / name


def class_of(name: str) -> str:
    """The class of a model, for example "LlamaForCausalLM". Raises UnknownNameError, or FileError where none is named."""
    return _class_of(folder_of(name))[1]


def load(name: str, dtype: Any = None, device: Any = None) -> Any:
    """A trained model in evaluation mode, of the class its folder names; float32 unless `dtype` says otherwise.

    Raises UnknownNameError, FileError for a damaged folder, or MissingExtraError where diffusers is needed and absent.
    """
    import torch

    from gratis.subjects.embedded import quiet_transformers

    folder = folder_of(name)
    library, kind = _class_of(folder)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise SubjectError(f"{dtype!r} is not a dtype; use float32, bfloat16 or float16.")
    dtype = torch.float32 if dtype is None else dtype
    try:
        with quiet_transformers():
            if library == "transformers":
                import transformers

                model = getattr(transformers, kind).from_pretrained(folder, dtype=dtype)
            else:
                diffusers = _diffusers()
                model = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=dtype)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise FileError(f"The zoo's model {name} cannot be loaded from {folder}: {error}") from error
    if hasattr(model, "eval"):
        model.eval()
    return model.to(device) if device is not None else model


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise MissingExtraError.of("diffusers", "diffusion") from None
    return diffusers


def _class_of(folder: Path) -> tuple[str, str]:
    """The library and class that a folder's configuration names."""
    for file in ("model_index.json", "config.json"):
        path = folder / file
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if "_class_name" in config:
                return "diffusers", config["_class_name"]
            if config.get("architectures"):
                return "transformers", config["architectures"][0]
    raise FileError(f"{folder} names no model class: its config.json or model_index.json is missing or damaged.")
