"""Tests compare numbers to the last digits: fp32 on processors with bf16 instructions too."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def compute_in_fp32(patch: pytest.MonkeyPatch) -> None:
    """Models load in fp32 unless a test names another type."""
    if find_spec("torch"):
        import torch

        from anchorkv.engines import torch_load

        patch.setattr(torch_load, "best_dtype", lambda device: torch.float32)
