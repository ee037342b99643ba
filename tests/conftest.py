"""What all tests have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Reference log-probs are kept in a folder of the tests, not in the user's cache."""
    before = os.environ.get("STEERWELL_CACHE")
    os.environ["STEERWELL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["STEERWELL_CACHE"]
    else:
        os.environ["STEERWELL_CACHE"] = before
