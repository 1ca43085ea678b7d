"""kill -9 at 20 random moments of one run, resumed every time; its end is compared with a run that was left alone, bit for bit.

The budget is in updates, so that both runs have the same end. Runs on the demo's docstrings, or on banking77 with --dataset.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from _common import ROOT, data_folder
from multistep import data, journal

BUDGET = "400 updates"


def decisions(run: Path) -> list[tuple[str, str]]:
    records = journal.read(run / "journal.jsonl")
    return [(r["kind"], r["trial"]) for r in records if r["kind"] in ("Committed", "RolledBack")]


def different_tensors(a: Path, b: Path) -> list[str]:
    """Tensors of states that are not the same in both runs."""
    found = []
    for file in sorted((a / "states").glob("*/*.safetensors")):
        other = b / "states" / file.relative_to(a / "states")
        one, two = load_file(file), load_file(other) if other.exists() else {}
        found += [f"{file.parent.name}: {k}" for k in one if k not in two or not one[k].equal(two[k])]
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--dataset", help="a dataset of ../shared/data; the demo's docstrings without it")
    given = options.parse_args()
    rng = random.Random(given.seed)
    place = Path(tempfile.mkdtemp(prefix="multistep-kills-"))
    if given.dataset:
        source = str(data_folder(given.dataset))
    else:
        source = str(place / "docstrings.csv")
        data.write_demo(Path(source))

    def command(out: Path) -> list[str]:
        if (out / "journal.jsonl").exists():
            words = ["resume", str(out)]
        else:
            shutil.rmtree(out, ignore_errors=True)
            words = ["fit", source, "--text", "text", "--label", "label", "--budget", BUDGET, "--out", str(out)]
        return [sys.executable, "-m", "multistep", *words, "--quiet"]

    started = time.monotonic()
    subprocess.run(command(place / "straight"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    straight_s = time.monotonic() - started
    done = 0
    while done < given.kills:
        process = subprocess.Popen(command(place / "killed"), cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(1.0, max(8.0, straight_s / 3)))
            print(f"the run ended before kill {done + 1}")
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
    subprocess.run(command(place / "killed"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    different = different_tensors(place / "straight", place / "killed")
    same = decisions(place / "straight") == decisions(place / "killed")
    print(
        f"{done} kills; straight run {straight_s:.0f} s; same decisions: {same}; tensors that differ: {len(different)}"
    )
    for line in different[:10]:
        print(f"  {line}")
    shutil.rmtree(place)
    return 0 if same and not different else 1


if __name__ == "__main__":
    sys.exit(main())
