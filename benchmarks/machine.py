"""Which machine a figure comes from."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """CPU, cores, load and date, for a result file."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The CPU's name; where the system hides it, its family and model numbers."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = (line.partition(":") for line in info.read_text().splitlines() if ":" in line)
    found: dict[str, str] = {}
    for name, _, value in lines:
        found.setdefault(name.strip(), value.strip())
    flags = found.get("flags", "").split()
    widest = next((f for f in ("amx_tile", "avx512f", "avx2") if f in flags), "")
    numbers = f"family {found.get('cpu family')}, model {found.get('model')}"
    return f"{found.get('model name', platform.processor())} ({numbers}{', ' + widest if widest else ''})"
