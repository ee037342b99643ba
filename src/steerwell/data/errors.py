"""The errors a user can mend.

An :class:`InputError` says what is wrong, where (file and row) and how to mend it, in one line. The command
line prints it without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """Bad input from the user: a file, a row, a name or a setting.

    ``str(error)`` is one line: ``FILE, row N: what is wrong. How to mend it.``
    """

    def __init__(
        self, what: str, *, file: str | Path | None = None, row: int | None = None, mend: str = ""
    ) -> None:
        self.what, self.file, self.row, self.mend = what, file, row, mend
        place = ", ".join(
            part for part in (str(file) if file else "", f"row {row}" if row is not None else "") if part
        )
        sentence = what.rstrip(".") + "."
        super().__init__(" ".join(part for part in (f"{place}:" if place else "", sentence, mend) if part))


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or lists the known ones."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean {match[0]!r}?" if match else f"Known: {', '.join(names)}."


__all__ = ["InputError", "nearest"]
