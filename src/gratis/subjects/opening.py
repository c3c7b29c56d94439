"""One way to open what methods act on; what comes back is always the ecosystem's own object."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gratis.contract.attach import Attachment
from gratis.contract.errors import FileError, MissingExtraError, SubjectError, UnknownNameError, suggestion
from gratis.subjects.embedded import EMBEDDED, convert_gguf, embedded_folder, quiet_transformers

_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def open(
    name: str | os.PathLike[str],
    *,
    dtype: Any = None,
    device: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """Open a subject by name.

    - `"smollm2"`: the embedded language model (converted once into the cache folder);
    - a folder or a `.gguf` file: a transformers model, or a diffusers pipeline where `model_index.json` says so;
    - `"http://…/v1"` or `"http://…/v1#MODEL"`: a chat endpoint (its key is read from OPENAI_API_KEY), and
      `"openai:MODEL"`: OpenAI's own;
    - `"zoo:NAME"`: a small trained model that comes with gratis (`gratis.zoo.names()`), of its own standard class;
    - `"chat:NAME"`: any language model of this list, as a local chat;
    - anything with one slash, `"owner/name"`: a model of the hub. Nothing else touches the network.

    `dtype` (a torch dtype or its name; float32 where the device is the CPU) and `device` are applied to models.
    Raises UnknownNameError, FileError, SubjectError or MissingExtraError in one sentence.
    """
    text = os.fspath(name)
    if text.startswith(("http://", "https://", "openai:")):
        from gratis.subjects.chat import Chat

        address, _, served = text.partition("#")
        return Chat(address, served or None)
    if text.startswith("chat:"):
        from gratis.subjects.chat import Chat

        return Chat(open(text.removeprefix("chat:"), dtype=dtype, device=device, progress=progress))
    if text.startswith("zoo:"):
        from gratis import zoo

        return zoo.load(text.removeprefix("zoo:"), dtype=dtype, device=device)
    if not text:
        raise UnknownNameError("There is no model '': name one, for example smollm2.")
    if text in EMBEDDED:
        return _transformers_model(str(embedded_folder(text, progress)), dtype, device)
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        return _transformers_model(str(convert_gguf(path, progress)), dtype, device)
    if path.is_dir():
        return _folder(path, dtype, device)
    if path.is_file():
        raise FileError(f"{path} is a file: name the folder of a model, or a .gguf file.")
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _hub(text, dtype, device)
    if "/" in text or text.startswith("."):
        raise FileError(f"There is no model folder {path}.")
    raise UnknownNameError(
        f"There is no model {text!r}{suggestion(text, EMBEDDED)}; or name a folder, a .gguf file, owner/name of "
        "the hub, or an http:// endpoint."
    )


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that came with `model`, from the folder or hub name it was loaded from. Raises SubjectError."""
    if isinstance(model, Attachment):
        return tokenizer_of(model.subject)
    if model not in _tokenizers:
        from transformers import AutoTokenizer

        source = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
        if not source:
            raise SubjectError(
                f"This {type(model).__name__} was not loaded from a folder or the hub, so its tokenizer is unknown: "
                "open it with gratis.open, or call gratis.subjects.opening.set_tokenizer(model, tokenizer)."
            )
        try:
            _tokenizers[model] = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise SubjectError(f"No tokenizer can be loaded from {source}: {error}") from error
    return _tokenizers[model]


def set_tokenizer(model: Any, tokenizer: Any) -> None:
    """Say which tokenizer belongs to a model that was built in memory."""
    _tokenizers[model] = tokenizer


def _transformers_model(source: str, dtype: Any, device: Any, kind: str = "") -> Any:
    """A model of the class named, where it is a model class of transformers, else a causal language model."""
    import torch
    import transformers

    named = getattr(transformers, kind, None)
    known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    loader: Any = named if known else transformers.AutoModelForCausalLM
    try:
        with quiet_transformers():
            model = loader.from_pretrained(source, dtype=_dtype(dtype) or torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise FileError(
            f"{source} cannot be opened as {kind if known else 'a language model'}: {_first_line(error)}"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise FileError(f"The weights in {source} are damaged: {_first_line(error)}") from error
    model.eval()
    return model.to(device) if device is not None else model


def _folder(path: Path, dtype: Any, device: Any) -> Any:
    if (path / "model_index.json").is_file():
        return _pipeline(str(path), dtype, device)
    if not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return _transformers_model(str(convert_gguf(found[0])), dtype, device)
        raise FileError(f"{path} holds no model: neither config.json, nor model_index.json, nor one .gguf file.")
    return _transformers_model(str(path), dtype, device, _named_class(path))


def _named_class(folder: Path) -> str:
    """The class that a folder's configuration names first, or nothing: what is wrong is said when it is loaded."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return ""
    named = config.get("architectures") if isinstance(config, dict) else None
    return str(named[0]) if isinstance(named, list) and named else ""


def _hub(name: str, dtype: Any, device: Any) -> Any:
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        is_pipeline = file_exists(name, "model_index.json")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        is_pipeline = False
    return _pipeline(name, dtype, device) if is_pipeline else _transformers_model(name, dtype, device)


def _pipeline(source: str, dtype: Any, device: Any) -> Any:
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise MissingExtraError.of("diffusers", "diffusion") from None
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            source, **({"torch_dtype": _dtype(dtype)} if dtype is not None else {})
        )
    except (OSError, ValueError) as error:
        raise FileError(f"{source} cannot be opened as a diffusion pipeline: {_first_line(error)}") from error
    return pipeline.to(device) if device is not None else pipeline


def _dtype(dtype: Any) -> Any:
    import torch

    if not isinstance(dtype, str):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise SubjectError(f"{dtype!r} is not a dtype; use float32, bfloat16 or float16.")
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
