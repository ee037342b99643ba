"""Where tests find the real preference data that is too large or too foreign for the repository."""

from __future__ import annotations

from pathlib import Path

import pytest


def real_data(name: str) -> Path:
    """The path of ``../shared/data/<name>``, seen from the repository; skips the test when it is not there."""
    path = Path(__file__).parents[2] / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"real data not present: {name}")
    return path
