"""What a merged folder has beside its weights.

Settings and tokenizer of the model it is laid out by, a model card with the recipe, and a record with checksums.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gratis.contract.errors import FileError
from gratis.contract.method import Merge
from gratis.contract.release import VERSION
from gratis.subjects.checkpoints import PIPELINE, RECORD, Checkpoint

CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "added_tokens.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
"""Files that are copied from the base."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".msgpack", ".h5", ".py")


def carry(source: Any, folder: Path) -> None:
    """Copy the settings and the tokenizer of the checkpoint `source` into `folder`."""
    if hasattr(source, "write_description"):
        source.write_description(folder)
        return
    for name in CARRIED:
        copy_within(source.folder, name, folder)
    if isinstance(source, Checkpoint) and source.components:
        _carry_pipeline(source.folder, source.components, folder)


def _carry_pipeline(source: Path, components: Sequence[str], folder: Path) -> None:
    """A pipeline's index, and everything of its components but weights, which are merged."""
    copy_within(source, PIPELINE, folder)
    for part in sorted(source.iterdir()):
        if not part.is_dir() or part.name.startswith("."):
            continue
        for file in sorted(part.iterdir()):
            index = file.name.endswith(".index.json") and part.name in components
            if file.is_file() and file.suffix not in WEIGHTS and not index:
                (folder / part.name).mkdir(exist_ok=True)
                copy_within(source, f"{part.name}/{file.name}", folder)


def copy_within(source: Path, name: str, folder: Path) -> None:
    """Copy `source/name`, if there is such a file, to `folder/name`.

    A link that leads out of `source` is refused, unless it leads into the blobs of a model hub's cache: a folder that
    somebody else made could otherwise have any file of yours copied. Raises FileError.
    """
    file = source / name
    if not file.is_file():
        return
    real, own = file.resolve(), source.resolve()
    blobs = own.parent.parent / "blobs"
    if own not in real.parents and not (own.parent.name == "snapshots" and blobs in real.parents):
        raise FileError(f"{file} is a link to {real}, outside its folder: put the file itself there.")
    shutil.copyfile(real, folder / name)


def describe(expert: Any, folder: Path) -> None:
    """Put the expert's tokenizer, chat template and generation settings in the place of those that were carried over."""
    for name in CARRIED:
        if name != "config.json":
            copy_within(expert.folder, name, folder)
    path = folder / "config.json"
    if path.is_file():
        file = expert.folder / "config.json"
        # As the file has it: a checkpoint whose rows are reordered does not name tokens by number.
        own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else expert.config()
        config = json.loads(path.read_text(encoding="utf-8"))
        ends = {key: own[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in own}
        path.write_text(json.dumps({**config, **ends}, indent=2) + "\n", encoding="utf-8")


def recipe_of(
    method: Merge, base: Any, experts: Sequence[Any], weights: Sequence[float], dtype: str | None, rules: Sequence[Any]
) -> dict[str, Any]:
    """The merge as a recipe: a table of plain values, with the names of the checkpoints for their paths."""
    found: dict[str, Any] = {"method": method.name, "parameters": dict(method.parameters())}
    if base is not None:
        found["base"] = base.path.name
    found["experts"] = [{"path": e.path.name, "weight": w} for e, w in zip(experts, weights, strict=True)]
    if rules:
        found["rules"] = [
            {
                "tensors": list(rule.tensors[:20]),
                "method": rule.method.name,
                "parameters": dict(rule.method.parameters()),
                **({"weights": list(rule.weights)} if rule.weights is not None else {}),
                **({"experts": list(rule.experts)} if rule.experts is not None else {}),
            }
            for rule in rules
        ]
    if dtype:
        found["dtype"] = dtype
    return found


def write_card(folder: Path, method: Merge, recipe: Mapping[str, Any]) -> None:
    """Write the model card, with the recipe in it, as README.md."""
    experts = ", ".join(str(entry["path"]) for entry in recipe["experts"])
    base = f"Base: {recipe['base']}. " if "base" in recipe else ""
    lines = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    weights = [entry["weight"] for entry in recipe["experts"]]
    (folder / "README.md").write_text(
        "---\ntags:\n- merge\n- gratis\n---\n\n# Merged model\n\n"
        f"{base}Experts: {experts} with weights {weights}.\n\n"
        f"Method: {method.name} ({method.card.title}, {method.card.year}). It gives {method.card.summary}.\n\n"
        f"```yaml\n{lines}```\n",
        encoding="utf-8",
    )


def write_record(folder: Path, recipe: Mapping[str, Any], checksums: Mapping[str, str]) -> None:
    """Write merge.json: the recipe, the version, and the SHA-256 of each file of weights."""
    content = {"gratis": VERSION, "recipe": dict(recipe), "files": dict(checksums)}
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
