"""One system of course.py on one dataset with one seed, in this process: prints its row as one JSON object.

A peer's clock starts when its libraries are imported, and stops when it gives back what predicts. Then the test is loaded and read once.
Ours runs through the command line (course_ours.py): its whole process is on its clock, imports and the reading of the test included.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _common import Row, load, rows_of_text
from _peers import Clock, Fitted, FittedText, Given, GivenText
from course_rows import OURS, TEXT, limit, nats_row, right_row, test_rows

# ---------------------------------------------------------------------------------------------- the peers


def labelled(system: str) -> Callable[[Given], Fitted]:
    """A peer on labelled texts, its libraries imported."""
    match system:
        case "trainer-defaults":
            from peer_finetune import defaults

            return defaults
        case "trainer-competent":
            from peer_finetune import competent

            return competent
        case "trainer-optuna":
            from peer_search import tpe

            return tpe
        case "trainer-asha":
            from peer_asha import asha, start

            empty_s = start()
            return lambda given: asha(given, empty_s)
        case "sklearn-grid":
            from peer_sklearn import fit

            return fit
        case "frozen-grid":
            from peer_frozen import fit

            return fit
        case "keras-lstm":
            from peer_keras import fit

            return fit
    raise SystemExit(f"benchmarks: no peer {system!r} for labelled texts.")


def running(system: str) -> Callable[[GivenText], FittedText]:
    """A peer on a running text, its libraries imported."""
    match system:
        case "nanogpt-recipe":
            from peer_gpt import nanogpt

            return nanogpt
        case "gpt-trainer":
            from peer_gpt_trainer import competent

            return competent
        case "gpt-optuna":
            from peer_gpt_trainer import tpe

            return tpe
    raise SystemExit(f"benchmarks: no peer {system!r} for a running text.")


def peer(system: str, dataset: str, budget_s: float, seed: int, most: int) -> Row:
    if dataset == TEXT:
        write = running(system)
        clock = _started(budget_s)
        rows = rows_of_text(dataset, "train")
        made = write(GivenText("".join(rows), seed, clock))
        wall_s = _stopped(clock)
        begun = time.monotonic()
        read = rows_of_text(dataset, "validation")  # the test here, as in nanoGPT; nobody was given it
        return nats_row(made.nats(read), read) | _ended(made.facts, wall_s, begun)
    learn = labelled(system)
    clock = _started(budget_s)
    parts = (*load(dataset, "train"), *load(dataset, "validation"))
    fitted = learn(Given(dataset, *parts, seed, clock))
    wall_s = _stopped(clock)
    texts, labels = load(dataset, "test")
    take = test_rows(dataset, most)
    begun = time.monotonic()
    found = fitted.predict([texts[i] for i in take])
    return right_row(dataset, found, take, texts, labels) | _ended(fitted.facts, wall_s, begun)


def _started(budget_s: float) -> Clock:
    signal.setitimer(signal.ITIMER_REAL, limit(budget_s))  # ends this process, unless it is done by then
    return Clock(budget_s)


def _stopped(clock: Clock) -> float:
    signal.setitimer(signal.ITIMER_REAL, 0)
    return clock.used_s


def _ended(facts: Row, wall_s: float, begun: float) -> Row:
    return {"wall_s": round(wall_s, 2), "test_s": round(time.monotonic() - begun, 2), "facts": facts}


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("system")
    made.add_argument("dataset")
    made.add_argument("budget_s", type=float)
    made.add_argument("seed", type=int)
    made.add_argument("--most", type=int, required=True, help="rows of the test")
    made.add_argument("--journals", type=Path, required=True, help="where the journals of ours are kept")
    given = made.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not the row
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    key = (given.system, given.dataset, given.budget_s, given.seed)
    if given.system.startswith(OURS):
        from course_ours import ours

        row = ours(*key, given.most, given.journals)
    else:
        row = peer(*key, given.most)
    print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    main()
