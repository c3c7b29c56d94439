"""Attaching to how a model attends, at the interface that transformers keeps for attention functions.

A method's function is registered under a name of its own, with the mask function that goes with the one it stands
before, and the model's configuration names it. Models that do not ask the interface are found by trying and refused.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.errors import SubjectError
from gratis.subjects.language import input_device, language_model, text_config

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""`attend(inner, module, query, key, value, attention_mask, **kwargs)`.

query: (batch, heads, length, head_dim); key and value: (batch, key heads, all, head_dim); attention_mask: what the
implementation below gets, None where it masks by itself; kwargs: `scaling`, `dropout` and what the model adds. Returns
the output (batch, length, heads, head_dim) and the weights or None. `inner` is the attention function that would have
been called, with the same arguments from `module` on.
"""


@dataclass(frozen=True)
class Reached:
    """A module that attends through the interface."""

    module: Any
    heads: int
    """Query heads."""
    local: bool
    """Whether it sees a window or chunk of the text only."""
    arguments: frozenset[str] = frozenset()
    """Names of what the model passes beside query, key, value and mask, and is not None: `scaling`, `s_aux`, …."""
    biased: bool = False
    """Whether its mask holds numbers to add to the logits, besides 0 and what hides a key."""
    key_heads: int = 0


PROBE_LENGTH = 7
_numbers = itertools.count()
_before: dict[str, str] = {}
"""Registered name to the implementation that it stands before."""
_outermost: dict[str, bool] = {}
"""Registered names that stay before all others."""
_added: dict[int, Tensor] = {}
"""Module to what is added to the logits of the first token."""
_registering = threading.Lock()


def install_attention(model: Any, method: str, attend: Attend, scope: Scope, *, outermost: bool = False) -> None:
    """Call `attend` wherever `model`'s text decoder attends, in the place of its attention function.

    What is attached later comes around what was attached earlier, except around one that is `outermost`: a method that
    attends to keys of its own does not call what is below it, and is given queries and keys as the model made them.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    config = text_config(model)
    top = config._attn_implementation or "eager"
    under = top in _outermost and not outermost
    below = _before[top] if under else top
    name = f"gratis-{method}-{next(_numbers)}"

    def function(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        return attend(_function_of(module, _before[name]), module, query, key, value, attention_mask, **kwargs)

    with _registering:
        scope.set_item(_before, name, below)
        scope.set_item(AttentionInterface._global_mapping, name, function)
        masks = AttentionMaskInterface._global_mapping
        if below in masks:
            scope.set_item(masks, name, masks[below])
        if outermost:
            scope.set_item(_outermost, name, True)
        if under:
            scope.set_item(_before, top, name)
        else:
            scope.set_attribute(config, "_attn_implementation_internal", name)


def add_to_first_token(module: Any, logs: Tensor, scope: Scope) -> None:
    """Declare that `logs` (heads,) is added to the logit of the text's first token wherever `module` attends.

    Whoever declares it adds it where the module attends through the interface; a method that attends to keys of its own
    asks for it.
    """
    scope.set_item(_added, id(module), logs)


def added_to_first_token(module: Any) -> Tensor | None:
    """(heads,) what is added to the logit of the text's first token, None where nothing is."""
    return _added.get(id(module))


def implementation_below(model: Any) -> str:
    """Name of what attends in the end, below all that is attached."""
    name: str = text_config(model)._attn_implementation or "eager"
    while name in _before:
        name = _before[name]
    return name


def takes_masks(model: Any) -> bool:
    """Whether what attends in the end adds masks of floats (batch, heads, length, all) to its logits."""
    return implementation_below(model) in {"sdpa", "eager"}


def holds_biases(mask: Any) -> bool:
    """Whether a mask of floats holds anything but 0 and what hides a key."""
    if not isinstance(mask, Tensor) or not mask.dtype.is_floating_point:
        return False
    return bool(((mask > torch.finfo(mask.dtype).min / 2) & (mask != 0)).any())


def check_attention(subject: Any, method: str) -> list[Reached]:
    """The modules that attend through the interface, in the order in which they are called.

    Tries a function that passes everything on. Raises SubjectError where the model does not call it, or where the
    mere name of the implementation changes what the model computes.
    """
    model = language_model(subject, method)
    reached: dict[int, Reached] = {}

    def pass_on(inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if id(module) not in reached:
            given = frozenset(name for name, argument in kwargs.items() if argument is not None)
            local = _is_local(model, module, kwargs)
            reached[id(module)] = Reached(module, query.shape[1], local, given, holds_biases(mask), key.shape[1])
        return inner(module, query, key, value, mask, **kwargs)

    plain = _probe(model, method)
    scope = Scope()
    try:
        install_attention(model, f"{method}-probe", pass_on, scope)
        through = _probe(model, method)
    finally:
        scope.close()
    if not reached:
        raise SubjectError(
            f"{method} needs attention that asks transformers' attention interface; {type(model).__name__} has an "
            "attention of its own, or none."
        )
    if not torch.equal(plain, through):
        raise SubjectError(
            f"{method} needs attention that does the same whatever its implementation is called; "
            f"{type(model).__name__} decides by that name what it computes."
        )
    return list(reached.values())


def pass_through(inner: Any, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The attention function that changes nothing."""
    result: tuple[Tensor, Tensor | None] = inner(module, *args, **kwargs)
    return result


def _is_local(model: Any, module: Any, kwargs: dict[str, Any]) -> bool:
    kinds, index = getattr(text_config(model), "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and isinstance(index, int) and index < len(kinds):
        return "sliding" in kinds[index] or "chunked" in kinds[index]
    return kwargs.get("sliding_window") is not None or getattr(module, "sliding_window", None) is not None


def _function_of(module: Any, name: str) -> Any:
    """The attention function called `name` in the file that defines `module`'s class: some have variants of theirs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for kind in type(module).__mro__:
        defined = vars(sys.modules[kind.__module__])
        if "ALL_ATTENTION_FUNCTIONS" in defined:
            default = defined.get("eager_attention_forward")
            return defined["ALL_ATTENTION_FUNCTIONS"].get_interface(name, default)
    return ALL_ATTENTION_FUNCTIONS[name]


@torch.no_grad()
def _probe(model: Any, method: str) -> Tensor:
    """Logits of two short rows, one of them padded on the left."""
    size = max(int(text_config(model).vocab_size), 2)
    tokens = torch.arange(1, 2 * PROBE_LENGTH + 1, device=input_device(model)).remainder(size).reshape(2, PROBE_LENGTH)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    try:
        logits: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SubjectError(
            f"{method} needs a model that reads padded text; {type(model).__name__} fails: {first}."
        ) from error
    return torch.nan_to_num(logits)
