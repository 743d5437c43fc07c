"""The built-in model with the adapter that the package brings for it, merged once into a file of the cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import platformdirs

from anchorkv.adapter import CONFIG, WEIGHTS
from anchorkv.errors import ModelError
from anchorkv.export import POLICY_FILE, SCORER_FILE, merge, settings_of

KIND = "Q8_0"
"""What the merged weights are stored as: llama.cpp's fastest on processors (docs/performance.md)."""


def adapted(base: Path, folder: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """`base` with the adapter in `folder` merged in: a file in the cache folder, written at first use.

    progress: (bytes written, bytes in all), while it is written. Merged once, reading costs nothing; an adapter loaded
    beside the weights costs every token (docs/performance.md). Raises ModelError when the cache folder cannot be
    written to, or the adapter is not the base's.
    """
    cache = platformdirs.user_cache_path("anchorkv") / "weights"
    target = cache / f"{base.stem}-anchored-{_digest(base, folder)}-{KIND}.gguf"
    if not target.is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(
                f"The built-in adapter is merged into a file in {cache}, which cannot be written to "
                f"({error.strerror}); set XDG_CACHE_HOME to a folder of your own, or leave it out (--no-adapter)."
            ) from None
        merge(base, folder, target, KIND, settings_of(folder), progress)
    return target


def _digest(base: Path, folder: Path) -> str:
    """Changes when the base file or the adapter does."""
    digest = hashlib.sha256(f"{base.name} {base.stat().st_size}".encode())
    for file in (CONFIG, WEIGHTS, POLICY_FILE, SCORER_FILE):
        if (folder / file).is_file():
            digest.update((folder / file).read_bytes())
    return digest.hexdigest()[:16]
