"""From a CSV to a model one can use, in half a minute: reviews made up on the spot, so that it runs anywhere."""

from __future__ import annotations

import csv
import random
import tempfile
from pathlib import Path

import multistep

GOOD = ("wonderful", "moving", "funny", "clever", "a joy to watch", "beautifully acted", "fresh")
BAD = ("dull", "clumsy", "far too long", "a waste of time", "badly acted", "stale", "annoying")
THINGS = ("The film", "The plot", "The acting", "The second half", "Every scene", "The music", "The ending")


def write_reviews(path: Path, rows: int = 600) -> None:
    rng = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "sentiment"])
        for _ in range(rows):
            words, label = rng.choice([(GOOD, "positive"), (BAD, "negative")])
            said = f"{rng.choice(THINGS)} is {rng.choice(words)} and {rng.choice(words)}."
            writer.writerow([f"{said} {rng.choice(THINGS)} is {rng.choice(GOOD + BAD)}.", label])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reviews.csv"
        write_reviews(path)
        run = multistep.fit(path, metric="f1_macro", budget="20s", out=Path(folder) / "run", model="none")
        for prediction in run.predict(["Every scene is a joy to watch.", "The plot is far too long and dull."]):
            print(prediction.value, f"{prediction.confidence:.2f}")
        print(run.explain())


if __name__ == "__main__":
    main()
