"""Two kinds of text that ship with every Python: the code of its standard library, and the English of its docstrings.

The parts that are held out are whole modules, chosen by a hash of their names, so that they are the same ones for
every version of Python.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import string
import sysconfig
import warnings
from pathlib import Path
from typing import Literal

Kind = Literal["code", "prose"]
CHARACTERS = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace) | {" "}))
"""The newline and the 95 printable characters of ASCII: what the texts consist of."""
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "encodings",
            "pydoc_data", "ensurepip", "__pycache__", "__phello__"}  # fmt: skip
HELD_OUT = 10
"""One module in so many is held out."""


def library_text(kind: Kind, held_out: bool) -> str:
    """The text of all modules that are held out, or of all others; `CHARACTERS` only.

    "code" is every module as `ast.unparse` writes it, without docstrings and comments; "prose" is the docstrings of
    its modules, classes and functions.
    """
    return _texts(held_out)[kind]


@functools.lru_cache(maxsize=2)
def _texts(held_out: bool) -> dict[Kind, str]:
    pieces: dict[Kind, list[str]] = {"code": [], "prose": []}
    for path, module in _modules(held_out):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"), module)
        except (SyntaxError, UnicodeDecodeError):
            continue
        pieces["prose"].append(_prose(tree))
        pieces["code"].append(_code(tree))
    others = {number: None for number in range(128) if chr(number) not in CHARACTERS}
    return {
        kind: "\n".join(part for part in parts if part.strip()).encode("ascii", "ignore").decode().translate(others)
        for kind, parts in pieces.items()
    }


def _modules(held_out: bool) -> list[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).as_posix()
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts) and not module.startswith(("_sysconfigdata", "config-")):
            chosen = hashlib.sha256(module.encode()).digest()[0] % HELD_OUT == 0
            if chosen == held_out:
                found.append((path, module))
    return found


_DESCRIBED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _prose(tree: ast.Module) -> str:
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _DESCRIBED)]
    return "\n\n".join(text for text in texts if text) + "\n"


def _code(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, _DESCRIBED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"
