"""Finding the parts of a U-Net by structure, counting its calls, and replacing a part's forward without a trace."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gratis.contract.attach import Scope
from gratis.contract.errors import SubjectError

PER_LAYER = ("resnets", "attentions", "motion_modules", "temp_attentions", "temp_convs")
"""Lists of a U-Net block that hold one module per layer."""


def unet_of(subject: Any, method: str) -> Any:
    """The U-Net of a diffusers pipeline, or the U-Net itself. Raises SubjectError."""
    try:
        from diffusers import DiffusionPipeline, ModelMixin
    except ImportError:
        raise SubjectError(f"{method} acts on diffusers objects: install 'gratis[diffusion]'.") from None
    unet = subject
    if isinstance(subject, DiffusionPipeline):
        unet = getattr(subject, "unet", None)
        if unet is None:
            raise SubjectError(
                f"{method} acts on U-Nets; {type(subject).__name__} has none (for diffusion transformers, diffusers has "
                "caches of its own: enable_cache)."
            )
    if type(unet).__name__ == "OptimizedModule" or getattr(unet, "_compiled_call_impl", None) is not None:
        raise SubjectError(f"{method} must be attached before the U-Net is compiled: attach first, then torch.compile.")
    if not isinstance(unet, ModelMixin):
        raise SubjectError(f"{method} acts on a diffusers pipeline with a U-Net, not on a {type(subject).__name__}.")
    if not all(isinstance(getattr(unet, name, None), nn.ModuleList) for name in ("down_blocks", "up_blocks")):
        raise SubjectError(
            f"{method} acts on U-Nets with down and up blocks; {type(unet).__name__} has none (for diffusion "
            "transformers, diffusers has caches of its own: enable_cache)."
        )
    return unet


@dataclass
class Layer:
    """What produces one skip tensor on the way down, or consumes one on the way up."""

    modules: list[nn.Module] = field(default_factory=list)

    @property
    def first(self) -> nn.Module:
        """The module that sees the layer's input."""
        return self.modules[0]


@dataclass
class UNetLayers:
    """A U-Net as a flat list of layers: skip tensor i is made by `down[i]` and used by `up[len(up) - 1 - i]`."""

    down: list[Layer]
    """`down[0]` is the input convolution; then one per residual layer and per downsampler."""
    middle: list[nn.Module]
    up: list[Layer]
    down_blocks: list[tuple[nn.Module, range]]
    """Blocks with the positions in `down` of their layers."""
    up_blocks: list[tuple[nn.Module, range]]
    """Blocks with the positions in `up` of their layers."""

    def deeper_than(self, skip: int) -> list[nn.Module]:
        """What neither makes skip tensors 0 to `skip` nor comes after their use: whole blocks where it can be."""
        entry = len(self.up) - 1 - skip
        deep = list(self.middle)
        for block, places in self.down_blocks:
            if places[0] > skip:
                deep.append(block)
            else:
                deep += [module for place in places if place > skip for module in self.down[place].modules]
        for block, places in self.up_blocks:
            if places[-1] < entry:
                deep.append(block)
            else:
                deep += [module for place in places if place < entry for module in self.up[place].modules]
        return deep


def unet_layers(unet: nn.Module, method: str) -> UNetLayers:
    """The layers of `unet` in the order of its skip connections. Raises SubjectError naming a block that has others."""
    down = [Layer([unet.get_submodule("conv_in")])]
    down_blocks: list[tuple[nn.Module, range]] = []
    for block in unet.get_submodule("down_blocks").children():
        _refuse_block(block, method)
        first = len(down)
        down.extend(_block_layers(block))
        if getattr(block, "downsamplers", None) is not None:
            down.append(Layer(list(block.downsamplers)))  # type: ignore[arg-type]
        down_blocks.append((block, range(first, len(down))))
    up: list[Layer] = []
    up_blocks: list[tuple[nn.Module, range]] = []
    for block in unet.get_submodule("up_blocks").children():
        _refuse_block(block, method)
        first = len(up)
        up.extend(_block_layers(block))
        up_blocks.append((block, range(first, len(up))))
    if len(up) != len(down):
        raise SubjectError(
            f"{method} needs one up layer per skip connection; this {type(unet).__name__} has {len(up)} up layers for "
            f"{len(down)} skips."
        )
    middle = getattr(unet, "mid_block", None)
    return UNetLayers(down, [middle] if middle is not None else [], up, down_blocks, up_blocks)


def _refuse_block(block: nn.Module, method: str) -> None:
    name = type(block).__name__
    if hasattr(block, "skip_conv") or name.startswith("K") or "Skip" in name or not hasattr(block, "resnets"):
        raise SubjectError(f"{method} does not know the skip connections of {name}; it acts on plain U-Net blocks.")


def _block_layers(block: nn.Module) -> list[Layer]:
    layers = [Layer([resnet]) for resnet in block.get_submodule("resnets").children()]
    for name in PER_LAYER[1:]:
        modules = getattr(block, name, None)
        if isinstance(modules, nn.ModuleList):
            for layer, module in zip(layers, modules, strict=False):
                if module is not None:
                    layer.modules.append(module)
    return layers


class ReplacedForward:
    """A module's forward that a method has taken over: `act(forward, args, kwargs)` decides what runs.

    Comes off exactly. If something else wrapped the forward in the meantime, it stays in that chain and does nothing.
    """

    def __init__(self, module: nn.Module, method: str, act: Callable[..., Any], scope: Scope) -> None:
        self._inner, self._act, self._method = module.forward, act, method
        self._on = True
        had = "forward" in vars(module)
        before = vars(module).get("forward")
        vars(module)["forward"] = self
        owner = weakref.ref(module)

        def restore() -> None:
            self._on = False
            current = owner()
            if current is not None and vars(current).get("forward") is self:
                if had:
                    vars(current)["forward"] = before
                else:
                    del vars(current)["forward"]

        scope.defer(restore)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._on:
            return self._inner(*args, **kwargs)
        return self._act(self._inner, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise SubjectError(f"Detach {self._method} before copying the model: a copy would run the original's weights.")

    def __reduce__(self) -> Any:
        raise SubjectError(f"Detach {self._method} before saving the model by pickle.")


class CallCounter:
    """Which generation, which call of it, and which context of a step a U-Net call belongs to.

    A generation starts at the first call, when the scheduler sets its timesteps, when the timestep rises, or when
    shape, dtype or device change. Calls between two scheduler steps are different contexts (conditional and
    unconditional); without a pipeline, so are calls that differ from the last in their condition only. Calls are
    counted, because schedulers such as PNDM and Heun visit a timestep more than once.
    """

    def __init__(self, pipeline: Any, scope: Scope) -> None:
        self._pipeline, self._scope = pipeline, scope
        self._schedulers: list[Any] = []
        self._signature: Any = None
        self._timestep = float("inf")
        self._fresh = True
        self._in_step = 0
        self._counts: dict[int, int] = {}
        self._sample: torch.Tensor | None = None
        self._condition: tuple[Any, ...] = ()
        self.generation = 0
        self._watch_scheduler()
        scope.defer(self._forget)

    @property
    def total(self) -> int | None:
        """U-Net calls per context in this generation, where the pipeline or its scheduler tells."""
        # A pipeline that starts from a picture visits only the last of its scheduler's timesteps.
        visited = getattr(self._pipeline, "num_timesteps", None)
        if isinstance(visited, int):
            return visited
        timesteps = getattr(getattr(self._pipeline, "scheduler", None), "timesteps", None)
        return len(timesteps) if timesteps is not None else None

    @property
    def noisy(self) -> str | None:
        """The scheduler's class, where it adds fresh noise at every step."""
        scheduler = getattr(self._pipeline, "scheduler", None)
        name = type(scheduler).__name__
        algorithm = str(getattr(getattr(scheduler, "config", None), "algorithm_type", ""))
        return name if "SDE" in name or "Ancestral" in name or algorithm.startswith("sde") else None

    def next(self, sample: torch.Tensor, timestep: Any, condition: tuple[Any, ...] = ()) -> tuple[int, int, bool]:
        """(context, call index within the generation, whether a generation starts) of the call that begins now.

        `condition` is what else the call was given.
        """
        self._watch_scheduler()
        # Read once per call; on an accelerator this waits for the timestep only, which pipelines keep on the host
        # or have just computed.
        value = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        signature = (tuple(sample.shape), sample.dtype, sample.device)
        starts = self._fresh or signature != self._signature or value > self._timestep
        if starts:
            self.generation += 1
            self._counts.clear()
            self._in_step = 0
        elif not self._schedulers and not self._other_condition(value, sample, condition):
            self._in_step = 0
        self._fresh, self._signature, self._timestep = False, signature, value
        if not self._schedulers:
            self._sample, self._condition = sample.detach(), _kept(condition)
        context = self._in_step
        self._in_step += 1
        index = self._counts.get(context, 0)
        self._counts[context] = index + 1
        return context, index, starts

    def _forget(self) -> None:
        self._sample, self._condition = None, ()

    def _other_condition(self, timestep: float, sample: torch.Tensor, condition: tuple[Any, ...]) -> bool:
        """Whether a call repeats the last one's timestep and sample under another condition."""
        if timestep != self._timestep or self._sample is None or not torch.equal(sample, self._sample):
            return False
        return not _same(condition, self._condition)

    def _watch_scheduler(self) -> None:
        scheduler = getattr(self._pipeline, "scheduler", None)
        if scheduler is None or any(scheduler is known for known in self._schedulers):
            return
        self._schedulers.append(scheduler)
        step, set_timesteps = scheduler.step, scheduler.set_timesteps
        import functools

        @functools.wraps(step)
        def counted_step(*args: Any, **kwargs: Any) -> Any:
            self._in_step = 0
            return step(*args, **kwargs)

        @functools.wraps(set_timesteps)
        def fresh_timesteps(*args: Any, **kwargs: Any) -> Any:
            self._fresh = True
            return set_timesteps(*args, **kwargs)

        self._scope.set_attribute(scheduler, "step", counted_step)
        self._scope.set_attribute(scheduler, "set_timesteps", fresh_timesteps)


def _kept(condition: Any) -> Any:
    """The condition with its lists as they are now: diffusers empties some of them during the call."""
    if isinstance(condition, Mapping):
        return {key: _kept(value) for key, value in condition.items()}
    return tuple(map(_kept, condition)) if isinstance(condition, (tuple, list)) else condition


def _same(a: Any, b: Any) -> bool:
    """Whether two conditions hold the same values."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b)
