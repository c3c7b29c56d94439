"""Reuse a U-Net's deep features between neighbouring sampling steps.

X. Ma, G. Fang and X. Wang, "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import GratisWarning, InputError, ParameterError, SubjectError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.diffusion import CallCounter, ReplacedForward, UNetLayers, unet_layers, unet_of

FEW_CALLS = 20
"""Below as many calls per generation, neighbouring ones are too different to share features."""


class DeepCache(Attachable):
    """Nearly the same picture in a fraction of the time: most steps run only the U-Net's shallow layers.

    At a key step the whole U-Net runs, and the hidden state that enters one of its last up layers is kept. At the
    steps in between, only the layers above that point run, with fresh skip connections and a fresh time embedding.
    """

    card = Card(
        title="DeepCache: Accelerating Diffusion Models for Free",
        authors="Ma, Fang, Wang",
        year=2024,
        seed=5,
        paper="CVPR 2024, arXiv:2312.00858",
        acts_on="diffusion pipeline",
        free_of=("training", "labels", "calibration data"),
        summary="the same pipeline, nearly the same picture, in a fraction of the time",
        unchanged_when={"interval": 1},
        examples={"interval": 2, "skip": 1},
        holds=("unet forward",),
        differs="Calls are counted; the timestep is not looked up in the scheduler's list, which repeats some.",
        limits=(
            "For samplers of many steps (25 and more): at 20 or fewer, neighbouring steps differ and the picture changes "
            "visibly. Not for diffusion transformers, which have no long skip connections."
        ),
        claims=(
            Claim(
                name="two of three calls run only the shallow layers, and sampling takes at most 0.6 of the time",
                task="pipeline-fidelity",
                metric="cpu_seconds",
                compare="ratio",
                at_most=0.6,
                parameters={"interval": 3},
            ),
            Claim(
                name="the picture stays close to that of the untouched pipeline",
                task="pipeline-fidelity",
                metric="relative_error",
                compare="value",
                at_most=0.1,
                parameters={"interval": 3},
            ),
        ),
    )

    interval: int = param(3, at_least=1, unit="calls", help="one whole call of the U-Net in this many", search=(1, 10))
    skip: int = param(0, at_least=0, unit="layers", help="down layers that still run in between; 0 is only the first")
    schedule: Literal["uniform", "power", "explicit"] = param(
        "uniform", help="whole calls evenly spaced, denser around a centre, or as listed"
    )
    power: float = param(1.4, above=1, help="how much denser a power schedule is around its centre")
    centre: int | None = param(None, above=0, unit="calls", help="call around which a power schedule is dense; None: 0")
    keys: tuple[int, ...] | None = param(None, at_least=0, unit="calls", help="whole calls of an explicit schedule")
    steps: int | None = param(
        None, above=0, unit="calls", help="calls per generation, for a power schedule on a bare U-Net"
    )

    def check_parameters(self) -> None:
        if self.schedule == "explicit":
            keys = self.keys or ()
            if not keys or keys[0] != 0 or list(keys) != sorted(set(keys)):
                raise ParameterError("DeepCache: keys must begin with 0 and rise, for example keys=(0, 5, 9).")
            if self.steps is not None and keys[-1] >= self.steps:
                raise ParameterError(f"DeepCache: keys must be below steps {self.steps}, not {keys[-1]}.")
        elif self.keys is not None:
            raise ParameterError("DeepCache: keys need schedule='explicit'.")
        if self.schedule == "power" and self.steps is not None:
            self.key_calls(self.steps)

    def check(self, subject: Any) -> None:
        unet = unet_of(subject, "DeepCache")
        layers = unet_layers(unet, "DeepCache")
        if self.skip >= len(layers.up):
            raise SubjectError(
                f"DeepCache: skip {self.skip} must be below {len(layers.up)}, the number of skip connections of this "
                f"{type(unet).__name__}."
            )
        if self.schedule == "power" and self.steps is None and unet is subject:
            raise SubjectError("DeepCache: a power schedule on a bare U-Net needs steps, the calls per generation.")
        if any(isinstance(vars(m).get("forward"), ReplacedForward) for m in unet.modules()):
            raise SubjectError("This U-Net already has a DeepCache on it, through its pipeline or by itself.")

    def install(self, subject: Any, scope: Scope) -> Callable[[], dict[str, Any]]:
        unet = unet_of(subject, "DeepCache")
        sampling = _Sampling(self, CallCounter(subject if subject is not unet else None, scope))
        if self.interval > 1 or self.schedule == "explicit":
            _replace_layers(unet_layers(unet, "DeepCache"), self.skip, sampling, scope)
        scope.hook(unet.register_forward_pre_hook(sampling.begin, with_kwargs=True))
        scope.defer(sampling.kept.clear)
        return sampling.report

    def key_calls(self, total: int) -> list[int]:
        """Indices of the calls that run the whole U-Net, of `total` calls. Raises ParameterError."""
        if self.schedule == "explicit":
            assert self.keys is not None
            return list(self.keys)
        if self.schedule == "uniform":
            return list(range(0, total, self.interval))
        return power_schedule(total, self.interval, self.power, self.centre)


def power_schedule(total: int, interval: int, power: float, centre: int | None) -> list[int]:
    """Key calls of the paper's non-uniform 1:N strategy (section 3.4), by the arithmetic of its released code.

    With a centre the lower end point is complex: its principal branch is kept until the real part is taken.
    Raises ParameterError when no power down to 1 gives ceil(total / interval) keys.
    """
    count = math.ceil(total / interval)
    exponent = power
    while exponent > 1:
        if centre is None:
            keys: list[int] = np.unique((np.linspace(0, total ** (1 / exponent), count + 1) ** exponent).astype(int))[
                :-1
            ].tolist()
        else:
            ends = complex(-centre) ** (1 / exponent), complex(total - centre) ** (1 / exponent)
            inner = np.unique(np.trunc((np.linspace(*ends, count + 1) ** exponent).real))[1:-1]
            keys = [0] + [int(v) + centre for v in inner]
        if len(keys) == count:
            return keys
        exponent -= 0.02
    raise ParameterError(
        f"DeepCache: no power schedule has {count} whole calls of {total} around {centre}; choose another centre or power."
    )


class _Sampling:
    """One attachment's progress: which call this is, what is kept, what was skipped."""

    def __init__(self, method: DeepCache, counter: CallCounter) -> None:
        self._method, self._counter = method, counter
        self.kept: dict[int, torch.Tensor] = {}
        self.outputs: dict[tuple[int, int], Any] = {}
        self.skip_channels = 0
        self.context = 0
        self.whole = True
        self.writable = False
        """Whether something writes into the hidden state in place, as diffusers' FreeU and its adapters do."""
        self._keys: frozenset[int] = frozenset()
        self._warned: set[str] = set()
        self._calls = self._whole = self._peak = 0

    def begin(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if unet.training and torch.is_grad_enabled():
            raise InputError(
                "DeepCache reuses features without their gradients: call unet.eval(), or use torch.no_grad()."
            )
        inputs = {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}
        condition = (*args[2:], *(kwargs[name] for name in sorted(kwargs) if name not in ("sample", "timestep")))
        self.context, index, starts = self._counter.next(inputs["sample"], inputs["timestep"], condition)
        free_u = any(getattr(block, "s1", None) for block in unet.up_blocks)
        self.writable = free_u or kwargs.get("down_intrablock_additional_residuals") is not None
        if starts:
            self.kept.clear()
            self.outputs.clear()
            self._keys = self._key_set()
            self._warn()
        uniform = self._method.schedule == "uniform"
        is_key = index % self._method.interval == 0 if uniform else index in self._keys
        self.whole = is_key or self.context not in self.kept
        self._calls += 1
        self._whole += self.whole

    def _key_set(self) -> frozenset[int]:
        if self._method.schedule == "uniform":
            return frozenset()
        total = self._method.steps or self._counter.total
        if total is None and self._method.schedule == "power":
            raise InputError("DeepCache: a power schedule needs steps, the calls per generation.")
        return frozenset(self._method.key_calls(total or 0))

    def _warn(self) -> None:
        """Say once where neighbouring calls are too different for reuse."""
        if self._method.interval == 1 and self._method.schedule != "explicit":
            return
        total, noisy = self._counter.total, self._counter.noisy
        if total is not None and total < FEW_CALLS:
            self._warn_once(
                f"DeepCache: {total} calls of the U-Net are few; below {FEW_CALLS}, neighbours differ and the picture "
                "changes visibly."
            )
        if noisy is not None:
            self._warn_once(
                f"DeepCache: {noisy} adds fresh noise at every step, so neighbours differ and the picture changes "
                "visibly; prefer a deterministic sampler."
            )

    def _warn_once(self, words: str) -> None:
        if words not in self._warned:
            self._warned.add(words)
            warnings.warn(words, GratisWarning, stacklevel=2)

    def keep(self, hidden: torch.Tensor) -> None:
        self.kept[self.context] = hidden.detach().clone()
        self._peak = max(self._peak, sum(t.nbytes for t in self.kept.values()))

    def __reduce__(self) -> Any:
        raise SubjectError("Detach DeepCache before saving the model by pickle.")

    def report(self) -> dict[str, Any]:
        return {
            "calls": self._calls,
            "whole_calls": self._whole,
            "shallow_calls": self._calls - self._whole,
            "generations": self._counter.generation,
            "peak_cache_bytes": self._peak,
        }


def _replace_layers(layers: UNetLayers, skip: int, sampling: _Sampling, scope: Scope) -> None:
    """Let deep modules return placeholders in between, and feed the entry layer what was kept."""
    entry = len(layers.up) - 1 - skip
    for number, module in enumerate(layers.deeper_than(skip)):
        ReplacedForward(module, "DeepCache", _placeholder(number, sampling), scope)

    def measure_skip(forward: Any, args: Any, kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        sampling.skip_channels = _tensor(out).shape[1]
        return out

    def enter(forward: Any, args: Any, kwargs: Any) -> Any:
        # The input is hidden state and skip tensor, concatenated along the channels; video U-Nets pass it by name.
        joined = args[0] if args else kwargs["input_tensor"]
        channels = joined.shape[1] - sampling.skip_channels
        if sampling.whole:
            sampling.keep(joined[:, :channels])
        else:
            joined = torch.cat([sampling.kept[sampling.context], joined[:, channels:]], dim=1)
        return forward(joined, *args[1:], **kwargs) if args else forward(**{**kwargs, "input_tensor": joined})

    ReplacedForward(layers.down[skip].modules[-1], "DeepCache", measure_skip, scope)
    ReplacedForward(layers.up[entry].first, "DeepCache", enter, scope)


def _placeholder(number: int, sampling: _Sampling) -> Callable[..., Any]:
    """A forward that runs in whole calls, and otherwise returns zeros of the recorded shapes that take no memory."""

    def act(forward: Any, args: Any, kwargs: Any) -> Any:
        key = (sampling.context, number)
        if sampling.whole:
            out = forward(*args, **kwargs)
            sampling.outputs[key] = _shapes(out)
            return out
        return _zeros(sampling.outputs[key], sampling.writable)

    return act


def _shapes(out: Any) -> Any:
    """Shape, dtype and device of each tensor of a module's output, in the output's own nesting of tuples."""
    if isinstance(out, torch.Tensor):
        return torch.empty_like(out, device="meta"), out.device
    return tuple(_shapes(part) for part in out)


def _zeros(shapes: Any, writable: bool) -> Any:
    if isinstance(shapes[0], torch.Tensor):
        like, device = shapes
        empty = torch.zeros(1, dtype=like.dtype, device=device).expand(like.shape)
        return empty.clone() if writable else empty
    return tuple(_zeros(part, writable) for part in shapes)


def _tensor(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]
