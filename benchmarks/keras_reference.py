"""The program of Keras's tutorials on imdb: TensorFlow's graph loop and eager loop against multistep.keras.optimize and multistep.fit.

Same model, data and batch size, one after the other on one machine. Same learning rate at the start: ours decays to zero and clips
at norm 1, theirs is constant, as in the guides. TensorFlow runs under an interpreter of its own
(--tf-python, with tensorflow and keras). An epoch is training and the validation loss; the eager loop's is reckoned from a few
updates, without judging. "graph best / ours": the graph loop's time to its best loss over our time to that loss. The last row is
`multistep.fit` with free choice of model: the time until its accuracy on the half of validation that it decides with passes the graph
loop's best on all of validation.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from _common import Results, Row, fit_and_test, load, load_average, markdown, parser, select

BENCH = "keras"
PROGRAM = Path(__file__).with_name("keras_program.py")
WORDS, STEPS, BATCH = 10_000, 200, 32  # 0 pads, 1 is any other word
LOOPS = ("tf-graph", "tf-eager", "multistep")


def arrays(rows: int) -> dict[str, np.ndarray]:
    """Token ids [N,T], padded and cut on the left as Keras's pad_sequences does, of train and validation; the first `rows` of each."""
    words = re.compile(r"[a-z0-9']+")
    splits = {k: load("imdb", k) for k in ("train", "validation")}
    train = [words.findall(t.lower()) for t in splits["train"][0]]
    counts = Counter(w for text in train for w in text)
    known = {w: n + 2 for n, (w, _) in enumerate(counts.most_common(WORDS - 2))}
    found = {}
    for split, (x, y) in {"train": ("x", "y"), "validation": ("u", "v")}.items():
        texts, labels = splits[split]
        ids = np.zeros((len(texts), STEPS), np.int32)
        for n, text in enumerate(texts):
            row = [known.get(w, 1) for w in words.findall(text.lower())][-STEPS:]
            ids[n, STEPS - len(row) :] = row
        classes = sorted(set(splits["train"][1]))
        targets = np.array([classes.index(k) for k in labels], np.float32)
        order = np.random.default_rng(0).permutation(len(texts))[: rows or None]
        found[x], found[y] = ids[order], targets[order]
    return found


def program(python: str, loop: str, path: Path, epochs: int, seed: int) -> Row:
    command = [
        python,
        str(PROGRAM),
        loop,
        str(path),
        "--epochs",
        str(epochs),
        "--batch",
        str(BATCH),
        "--seed",
        str(seed),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        return {"ok": False, "status": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if "epochs" in found:
        best = min(found["epochs"], key=lambda e: e["val_loss"])
        found["epoch_s"] = float(np.median([e["epoch_s"] for e in found["epochs"]]))
        found["best_val_loss"], found["best_at_s"] = best["val_loss"], best["wall_s"]
        accuracies = [e["val_accuracy"] for e in found["epochs"] if "val_accuracy" in e]
        found["best_val_accuracy"] = max(accuracies, default=found.get("val_accuracy"))
    return {"ok": True, **found}


def passes(results: Results, budget: str, seed: int, target: float) -> Row:
    """`multistep.fit` with free choice of model: when a committed predictor's validation accuracy first passed the target."""
    journals = results.folder / "journals"
    row = fit_and_test("imdb", budget, seed, journals=journals)
    if not row["ok"]:
        return row
    with gzip.open(journals / f"imdb-{budget}-{seed}.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    better = [r for r in records if r["kind"] == "Committed" and r["metrics"].get("accuracy", [0])[0] > target]
    first = better[0] if better else None
    found = {
        "passed_at_s": first and first["clock"]["wall_s"],
        "val_accuracy": first and first["metrics"]["accuracy"][0],
    }
    return {**row, **found, "target": target}


def table(rows: list[Row]) -> str:
    head = [
        "seed",
        "loop",
        "s an epoch",
        "best val loss",
        "after s",
        "best val accuracy",
        "graph epoch / ours",
        "graph best / ours",
    ]
    body = []
    for seed in sorted({r["seed"] for r in rows}):
        graph = next(iter(select(rows, system="tf-graph", seed=seed)), None)
        for row in select(rows, seed=seed):
            name, facts = row["system"], ["-"] * 6
            if "epoch_s" in row:
                facts[0] = f"{row['epoch_s']:.1f}" + (" (reckoned)" if "extrapolated_from_updates" in row else "")
            if "best_val_loss" in row:
                facts[1:4] = [
                    f"{row['best_val_loss']:.4f}",
                    f"{row['best_at_s']:.1f}",
                    f"{row['best_val_accuracy']:.4f}",
                ]
            if graph is not None and name == "multistep":
                facts[4] = f"{graph['epoch_s'] / row['epoch_s']:.2f}"
                there = [e["wall_s"] for e in row["epochs"] if e["val_loss"] <= graph["best_val_loss"]]
                facts[5] = f"{graph['best_at_s'] / there[0]:.2f}" if there else "not reached"
            if name == "multistep-fit":
                facts[2] = "not passed" if row["passed_at_s"] is None else f"{row['passed_at_s']:.1f}"
                facts[3] = "-" if row["val_accuracy"] is None else f"{row['val_accuracy']:.4f}"
                if graph is not None and row["passed_at_s"]:
                    facts[5] = f"{graph['best_at_s'] / row['passed_at_s']:.2f}"
            body.append([seed, name, *facts])
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__, seeds=(0,))
    options.add_argument("--tf-python", required=True, help="an interpreter with tensorflow and keras")
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--rows", type=int, default=0, help="of each split; 0: all. For trying this command")
    options.add_argument("--fit-budget", default="60s", help="of the last row, in seconds")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    length = f"{given.epochs} epochs" + (f" of {given.rows} rows" if given.rows else "")
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as place:
        path = Path(place) / "imdb.npz"
        np.savez(path, allow_pickle=False, **arrays(given.rows))
        for seed in given.seeds:
            for loop in LOOPS:
                if not results.has("imdb", length, loop, seed):
                    python = sys.executable if loop == "multistep" else given.tf_python
                    before = load_average()
                    results.add("imdb", length, loop, seed, program(python, loop, path, given.epochs, seed), before)
            graph = [r for r in select(results.rows, system="tf-graph", seed=seed, budget=length) if r["ok"]]
            if graph and not results.has("imdb", given.fit_budget, "multistep-fit", seed):
                target = graph[0]["best_val_accuracy"]
                before = load_average()
                results.add(
                    "imdb",
                    given.fit_budget,
                    "multistep-fit",
                    seed,
                    passes(results, given.fit_budget, seed, target),
                    before,
                )


if __name__ == "__main__":
    main()
