"""``python -m steerwell`` is ``steerwell``."""

from __future__ import annotations

import sys

from steerwell.cli import main

sys.exit(main())
