"""The same scenes as other cameras would see them: domain shifts of pictures, labels untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gratis.contract.errors import InputError, ParameterError
from gratis.zoo.sprites.rendering import lattice_noise
from gratis.zoo.sprites.scene import require_name

_Pictures = NDArray[np.floating[Any]]


def shift(images: NDArray[np.uint8], domain: str, strength: float = 1.0, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures (batch, height, width, 3) uint8 as seen in `domain`, one of `DOMAINS`.

    `strength` scales the shift: 0 returns the pictures unchanged, 1 is the domain as named, more is harder. Noise
    depends on the seed and the row, so that a stream of batches should pass a new seed for each batch.
    """
    require_name("domain", domain, tuple(DOMAINS))
    if not np.isfinite(strength) or strength < 0:
        raise ParameterError(f"strength must be finite and at least 0, not {strength}.")
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise InputError(
            f"Pictures must be uint8 of shape (batch, height, width, 3), not {images.dtype} {images.shape}."
        )
    if strength == 0:
        return images.copy()
    changed = DOMAINS[domain](images.astype(np.float32) / 255, float(strength), seed)
    return (np.clip(changed, 0, 1) * 255 + 0.5).astype(np.uint8)


def _clear(images: _Pictures, strength: float, seed: int) -> _Pictures:
    return images


def _noise(images: _Pictures, strength: float, seed: int) -> _Pictures:
    """Independent normal noise per pixel and channel, standard deviation 0.15."""
    keys = np.arange(len(images), dtype=np.int64) + (seed << 32)
    side = max(images.shape[1:3])
    noise = np.stack([lattice_noise(keys, side, stream=channel + 1) for channel in range(3)], axis=-1)
    return images + 0.15 * strength * noise[:, : images.shape[1], : images.shape[2]]


def _fog(images: _Pictures, strength: float, seed: int) -> _Pictures:
    """Contrast fades to light grey towards the top, as with distance: 75 % there, 25 % at the bottom."""
    depth = np.linspace(0.75, 0.25, images.shape[1], dtype=np.float32)[None, :, None, None]
    veil: _Pictures = 1 - (1 - depth) ** strength
    return images * (1 - veil) + 0.75 * veil


def _night(images: _Pictures, strength: float, seed: int) -> _Pictures:
    """Dark and bluish: each channel scaled, blue the least."""
    darker: _Pictures = np.array([0.30, 0.36, 0.55], np.float32) ** strength
    return images * darker


def _cast(images: _Pictures, strength: float, seed: int) -> _Pictures:
    """A warm colour cast."""
    warmer: _Pictures = np.array([1.15, 0.85, 0.55], np.float32) ** strength
    return images * warmer


def _blur(images: _Pictures, strength: float, seed: int) -> _Pictures:
    """Gaussian blur whose standard deviation is 1/32 of the height."""
    from scipy.ndimage import gaussian_filter

    spread = float(strength) * images.shape[1] / 32
    blurred: _Pictures = gaussian_filter(images, sigma=(0, spread, spread, 0), mode="nearest")
    return blurred


def _faded(images: _Pictures, strength: float, seed: int) -> _Pictures:
    """Contrast at 35 %, around mid grey."""
    return 0.5 + (images - 0.5) * float(0.35**strength)


def _negative(images: _Pictures, strength: float, seed: int) -> _Pictures:
    """Inverted brightness; strength below 1 mixes."""
    mix = min(float(strength), 1.0)
    return images * (1 - mix) + (1 - images) * mix


def _drawing(images: _Pictures, strength: float, seed: int) -> _Pictures:
    """Edges only, dark on white paper: no colour is left; strength below 1 mixes with the picture."""
    grey = images.mean(axis=-1)
    down = np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    right = np.abs(np.diff(grey, axis=2, append=grey[:, :, -1:]))
    paper: _Pictures = np.clip(1 - 4 * np.maximum(down, right), 0, 1)[..., None]
    mix = min(float(strength), 1.0)
    return images * (1 - mix) + paper * mix


DOMAINS: dict[str, Callable[[_Pictures, float, int], _Pictures]] = {
    "clear": _clear, "noise": _noise, "fog": _fog, "night": _night, "cast": _cast, "blur": _blur, "faded": _faded,
    "negative": _negative, "drawing": _drawing,
}  # fmt: skip
"""Domains by name; "clear" is the pictures as rendered."""
