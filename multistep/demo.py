"""The main job on data that every machine has: which package does this docstring document? Run by `make demo`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from multistep import cli, data

FOLDER = Path("runs/demo")
BUDGET = "90s"


def main() -> int:
    """Write the data, run `fit` on it, and show what came of it. Anything in runs/demo is replaced."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    path = FOLDER / "docstrings.csv"
    data.write_demo(path)
    run = FOLDER / "run"
    print(f"The docstrings of this Python's standard library are in {path}: which package does each of them document?")
    code = cli.run(["fit", str(path), "--metric", "accuracy", "--budget", BUDGET, "--out", str(run)])
    if code == 0:
        cli.run(["predict", str(run), "Return a new event loop and set it as the current one."])
        print(f"The run is in {run}: its model in {run}/model, its story in {run}/journal.jsonl.")
    return code


if __name__ == "__main__":
    sys.exit(main())
