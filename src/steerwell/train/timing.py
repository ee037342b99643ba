"""How fast a run is: ``timing.jsonl``, a line per step, apart from the figures, which are the same each time."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

RECENT = 20  # steps whose speed is shown while a run goes on


class Timing:
    """The seconds and tokens of each step, kept over interrupted sittings. Evaluation is not counted."""

    def __init__(self, path: Path, start: int, *, writes: bool = True) -> None:
        """Go on behind step ``start``: lines of later steps (done once, and lost) are dropped. Of several
        processes one ``writes``.
        """
        kept = [line for line in _lines(path) if line["step"] <= start]
        self.seconds = sum(line["seconds"] for line in kept)
        self.tokens = sum(line["tokens"] for line in kept)
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        if writes:
            aside = path.with_name(f".{path.name}.tmp")
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
            aside.replace(path)
        self._file = open(path if writes else os.devnull, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        self._begun = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._begun = time.perf_counter()

    def end(self, step: int, tokens: int) -> None:
        """A step has ended that read ``tokens`` tokens (prompts counted once)."""
        seconds = time.perf_counter() - self._begun
        self.seconds += seconds
        self.tokens += tokens
        self._recent.append((seconds, tokens))
        self._file.write(json.dumps({"step": step, "seconds": round(seconds, 6), "tokens": tokens}) + "\n")
        self._file.flush()

    def recent(self) -> float:
        """Tokens per second over the last steps; 0 before the first."""
        seconds = sum(s for s, _ in self._recent)
        return sum(t for _, t in self._recent) / seconds if seconds else 0.0

    def about(self) -> dict[str, Any]:
        """What ``run.json`` says at the end: seconds in steps, tokens per second of the whole run."""
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return {"step_seconds": round(self.seconds, 3), "tokens_per_second": round(speed, 1)}

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may end in a torn one."""
    found: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                value = json.loads(line)
                found.append({key: value[key] for key in ("step", "seconds", "tokens")})
    return found


__all__ = ["Timing"]
