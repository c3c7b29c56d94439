"""Getting a JSON value out of a reply's text, and saying why it does not fit a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gratis.contract.errors import InputError, MissingExtraError


def parse_json(text: str) -> Any:
    """The JSON value of `text`: the whole, else its last fenced block, else its first balanced object or list.

    Raises ValueError where there is none.
    """
    candidates = [text.strip()]
    candidates += [match.strip() for match in re.findall(r"```(?:json)?\s*\n(.*?)```", text, flags=re.DOTALL)][::-1]
    balanced = _balanced(text)
    if balanced is not None:
        candidates.append(balanced)
    for candidate in candidates:
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    raise ValueError("it holds no JSON value")


def choice_schema(choices: Sequence[str]) -> dict[str, Any]:
    """The JSON Schema of one of the choices; an object, because not every server takes a bare string."""
    answer = {"type": "string", "enum": list(choices)}
    return {"type": "object", "properties": {"answer": answer}, "required": ["answer"], "additionalProperties": False}


def chosen(text: str, choices: Sequence[str]) -> str | None:
    """The choice that `text` is, plain, as a JSON string or by `choice_schema`; None where it is none."""
    said: Any = text.strip()
    if said not in choices:
        try:
            said = parse_json(text)
        except ValueError:
            return None
        said = said.get("answer") if isinstance(said, Mapping) else said
    return said if isinstance(said, str) and said in choices else None


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise InputError for a JSON Schema that is none, MissingExtraError where it cannot be told."""
    jsonschema = _jsonschema()
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"response_schema is no JSON Schema: {error.message}.") from error


def mismatch(value: Any, schema: Mapping[str, Any]) -> str | None:
    """Why `value` does not fit the JSON Schema, or None."""
    jsonschema = _jsonschema()
    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError as error:
        return str(error.message)
    return None


def _jsonschema() -> Any:
    try:
        import jsonschema
    except ImportError:
        raise MissingExtraError.of("jsonschema", "programs") from None
    return jsonschema


def _balanced(text: str) -> str | None:
    start = next((i for i, c in enumerate(text) if c in "{["), None)
    if start is None:
        return None
    depth, quoted, escaped = 0, False, False
    for end in range(start, len(text)):
        c = text[end]
        if quoted:
            quoted = escaped or c != '"'
            escaped = not escaped and c == "\\"
        elif c == '"':
            quoted = True
        elif c in "{[":
            depth += 1
        elif c in "}]":
            depth -= 1
            if depth == 0:
                return text[start : end + 1]
    return None
