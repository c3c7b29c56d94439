"""Whether two models mean the same by every token id."""

from __future__ import annotations

from collections.abc import Mapping


def differences(one: Mapping[str, int], other: Mapping[str, int]) -> str:
    """How two vocabularies (string to id) differ, the first ids named; an empty string where they do not."""
    if one == other:
        return ""
    first = {number: token for token, number in one.items()}
    second = {number: token for token, number in other.items()}
    different = sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))
    shown = ", ".join(f"{n} is {first.get(n)!r} and {second.get(n)!r}" for n in different[:3])
    return f"{len(different):,} token ids differ between them: {shown}"
