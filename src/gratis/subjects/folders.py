"""Where gratis keeps what it made once and can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder of gratis: `GRATIS_CACHE`, else the platform's cache folder."""
    if chosen := os.environ.get("GRATIS_CACHE"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("gratis"))
