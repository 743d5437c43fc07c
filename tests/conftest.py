"""Settings of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from hypothesis import settings

# Machines that run tests are busy ones: a deadline would make slow look like wrong.
settings.register_profile("anchorkv", deadline=None)
settings.load_profile("anchorkv")


@pytest.fixture(autouse=True, scope="session")
def _exact() -> Iterator[None]:
    """Tests compare numbers to the last digits: fp32 on processors with bf16 instructions too."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("torch"):
            import torch

            from anchorkv.engines import torch_load

            patch.setattr(torch_load, "best_dtype", lambda device: torch.float32)
        yield
