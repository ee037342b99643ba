"""Five preference objectives on the small world's own data, by one recipe: what ``--compare`` shows.

    steerwell demo --out runs/demo
    python benchmarks/compare_world.py

The second line runs the command that docs/compare.md shows, and keeps its result with the machine; what is in
runs/compare already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from machine import machine  # noqa: E402
from synthetic import save_json  # noqa: E402

COMMAND = "steerwell train examples/compare.toml --compare dpo,ipo,simpo,kto,orpo --max-new-tokens 72"
DEFAULT_OUT = HERE / "results" / "compare_world.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="result file")
    args = parser.parse_args()
    if not Path("runs/demo/preferences.db").exists():
        parser.error("run steerwell demo --out runs/demo first, in this folder")
    done = subprocess.run(
        [sys.executable, "-m", *COMMAND.split(), "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout)
    for row in found["contenders"]:
        del row["curves"]
        row["cpu_seconds"] = json.loads((Path(row["out"]) / "run.json").read_text())["cpu_seconds"]
    save_json(args.out, {"command": COMMAND, "machine": machine(), **found})


if __name__ == "__main__":
    main()
