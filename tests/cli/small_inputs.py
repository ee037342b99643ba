"""Small inputs for the tests of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAIRS = [
    {"prompt": f"Say {word}.", "chosen": f"Here is {word}.", "rejected": f"No {word} for you."}
    for word in ("apple", "brick", "cloud", "drum", "eagle", "flute", "grape", "house", "iron", "jar")
]


def write(path: Path, *rows: Any) -> Path:
    """A JSONL file of the rows (texts are written as they are)."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
