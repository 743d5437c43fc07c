"""Settings of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from exact import compute_in_fp32
from hypothesis import settings

# Machines that run tests are busy ones: a deadline would make slow look like wrong.
settings.register_profile("anchorkv", deadline=None)
settings.load_profile("anchorkv")


@pytest.fixture(autouse=True, scope="session")
def _exact() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        compute_in_fp32(patch)
        yield
