"""Texts in scikit-learn's own tools: a pipeline, folds, a search and a tuned threshold, on reviews made up on the spot."""

from __future__ import annotations

import random

import numpy as np
from sklearn.model_selection import GridSearchCV, TunedThresholdClassifierCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from multistep.sklearn import TextClassifier

GOOD = ("wonderful", "moving", "funny", "clever", "a joy to watch", "beautifully acted", "fresh")
BAD = ("dull", "clumsy", "far too long", "a waste of time", "badly acted", "stale", "annoying")
THINGS = ("The film", "The plot", "The acting", "The second half", "Every scene", "The music", "The ending")


def reviews(rows: int = 400) -> tuple[list[str], np.ndarray]:
    """One review in four is bad; each says one thing that fits and one that may not, and one label in ten is wrong."""
    rng = random.Random(0)
    texts, labels = [], []
    for _ in range(rows):
        words, label = (BAD, "bad") if rng.random() < 0.25 else (GOOD, "good")
        texts.append(
            f"{rng.choice(THINGS)} is {rng.choice(words)}. {rng.choice(THINGS)} is {rng.choice(GOOD + BAD)}.\n"
        )
        label = rng.choice(("good", "bad")) if rng.random() < 0.2 else label
        labels.append(label)
    return texts, np.array(labels)


def strip(texts: list[str]) -> list[str]:
    return [text.strip() for text in texts]


def main() -> None:
    texts, labels = reviews()
    train, test, y_train, y_test = train_test_split(texts, labels, stratify=labels, random_state=0)

    # a budget in updates: the same result on every machine, and the same effort for every candidate of a search
    text = TextClassifier(budget="200 updates", model="none")
    pipe = make_pipeline(FunctionTransformer(strip), text)
    print("folds", cross_val_score(pipe, train, y_train, cv=3).round(3))

    grid = {"textclassifier__metric": ["accuracy", "f1_macro"]}
    search = GridSearchCV(pipe, grid, cv=3, scoring="f1_macro").fit(train, y_train)
    print("search", search.best_params_, f"{search.score(test, y_test):.3f}")

    tuned = TunedThresholdClassifierCV(text, scoring="balanced_accuracy", cv=3).fit(train, y_train)
    print("threshold", f"{tuned.best_threshold_:.3f}", "accuracy", f"{tuned.score(test, y_test):.3f}")

    print(search.best_estimator_[-1].explain())


if __name__ == "__main__":
    main()
