"""Floor 4: evaluation. Every number has an interval and leads back to texts."""

from __future__ import annotations

from steerwell.evals.stats import Estimate

__all__ = ["Estimate"]
