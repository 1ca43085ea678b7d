"""What the validation rows are worth to a linear model: solved on train, and at the same strength on train and validation; whole tests.

Texts and splits as `fit` reads them (rows of validation that are in train decide nothing and are left out). No clock: a solve is a solve.
The seed moves only how validation is halved, and with it the strength that is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from _common import Results, Row, data_folder, load_average, markdown, mean_sd, parser, select, values
from _paired import pack_right, unpack_right
from multistep import data
from multistep.models.linear import candidates, fit_linear, path_to
from multistep.tasks import Classify
from multistep.text import text_facts
from multistep.types import Example

BENCH = "refit"
DATASETS = ("imdb", "chnsenticorp", "banking77", "sst2")
SYSTEMS = ("train", "train and validation")


def run(dataset: str, seed: int) -> dict[str, Row]:
    """Both systems: accuracy, log-loss, every row right or wrong, and its nats."""
    found = data.load(data_folder(dataset), text="text", label="label", seed=seed)
    task = Classify(labels=found.labels)

    def solve(
        examples: Sequence[Example], valid: Sequence[Example], l2s: tuple[float, ...] | None
    ) -> tuple[Row, float]:
        started = time.monotonic()
        texts, targets = _read(task, examples)
        features = candidates("classify", task.n_outputs, text_facts(_read(task, found.train)[0]))[0]
        held = _read(task, valid) if valid else None
        model, facts = fit_linear(texts, targets, "classify", task.n_outputs, features=features, valid=held, l2s=l2s)
        took, (asked, right) = time.monotonic() - started, _read(task, found.test)
        scores = model.logits(asked)
        scores -= scores.max(1, keepdims=True)
        nats_N = (np.log(np.exp(scores).sum(1, keepdims=True)) - scores)[np.arange(len(right)), right]
        right_N = scores.argmax(1) == right
        return {
            "ok": True, "rows": len(texts), "accuracy": float(right_N.mean()), "log_loss": float(nats_N.mean()),
            "right": pack_right(right_N), "log_loss_se": float(nats_N.std() / len(nats_N) ** 0.5), "solve_s": round(took, 2),
        }, facts["strength"]  # fmt: skip

    alone, strength = solve(found.train, found.control, None)
    both = [*found.train, *found.control, *found.calibration]
    together, _ = solve(both, (), path_to(strength / len(both), len(found.train)))
    return dict(zip(SYSTEMS, (alone, together), strict=True))


def _read(task: Classify, examples: Sequence[Example]) -> tuple[list[str], np.ndarray]:
    return [e.text for e in examples], task.encode([e.label for e in examples])


def table(rows: list[Row]) -> str:
    head = [
        "dataset",
        "rows",
        "test accuracy, train",
        "with validation",
        "gain, points ± se",
        "log-loss, train",
        "with validation",
    ]
    body = []
    for dataset in DATASETS:
        alone, both = (select(rows, dataset=dataset, system=s) for s in SYSTEMS)
        if not alone or not both:
            continue
        pairs = [
            unpack_right(b["right"]).astype(float) - unpack_right(a["right"])
            for a in alone for b in both if a["seed"] == b["seed"]
        ]  # fmt: skip
        gain_N = np.mean(pairs, axis=0)  # of one row over seeds, so that rows are what varies
        gain = f"{100 * gain_N.mean():+.2f} ± {100 * gain_N.std() / len(gain_N) ** 0.5:.2f}"
        size = f"{alone[0]['rows']:,} and {both[0]['rows']:,}"
        scores = [mean_sd(values(some, key)) for key in ("accuracy", "log_loss") for some in (alone, both)]
        body.append([dataset, size, scores[0], scores[1], gain, scores[2], scores[3]])
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    for seed in given.seeds:
        for dataset in given.datasets:
            if all(results.has(dataset, "0s", system, seed) for system in SYSTEMS):
                continue
            before = load_average()
            for system, row in run(dataset, seed).items():
                results.add(dataset, "0s", system, seed, row, before)


if __name__ == "__main__":
    main()
