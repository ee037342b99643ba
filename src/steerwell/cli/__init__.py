"""The command line: ``steerwell VERB …``, one sub-command per verb.

Exit status: 0 done, 1 a check did not pass, 2 usage or bad input (one line), 130 interrupted. Nothing heavy
is imported before a verb needs it, so ``--help`` is quick.
"""

from __future__ import annotations

from steerwell.cli.app import main

__all__ = ["main"]
