"""What summaries and answers of language.py are held against on the same test rows, paired: writers from the literature, not ours to
choose among. Nothing of them is fitted on the test.

    lead-1..3   the first sentences
    lexrank     the most central sentence of a graph of tf-idf cosines: Erkan and Radev 2004, JAIR 22
    centroid    the sentence nearest to the document's mean tf-idf: Radev et al. 2004, Information Processing and Management 40
    embedding   the sentence nearest to the mean of the encoder's sentence embeddings: Rossiello et al. 2017, MultiLing
    lexical     answers: our own convex ranking of spans by their words (models/passage.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

import multistep
from _common import Row
from multistep.data.records import LanguageData, load_language
from multistep.metrics.texts import compare_rows, statistics
from multistep.models.baselines import Lead
from multistep.models.passage import Passage
from multistep.models.ranking import sentences
from multistep.models.source import default_encoders
from multistep.other_writers import encoder_features

DAMPING, LINKED = 0.85, 0.1  # of lexrank: its source's values


def one_sentence(
    records: Sequence[Any], vectors: Callable[[list[str]], Any], best: Callable[[np.ndarray], int]
) -> list[str]:
    """Of each document the sentence that `best` picks from the unit vectors [S,D] of its sentences."""
    split = [sentences(r.source) or [r.source] for r in records]
    x_ND = vectors([s for part in split for s in part])
    found, start = [], 0
    for part in split:
        x_SD = x_ND[start : start + len(part)]
        x_SD = np.asarray(x_SD.todense()) if hasattr(x_SD, "todense") else x_SD
        found.append(part[best(x_SD / np.maximum(np.linalg.norm(x_SD, axis=1, keepdims=True), 1e-12))])
        start += len(part)
    return found


def lexrank(x_SD: np.ndarray) -> int:
    links_SS = (x_SD @ x_SD.T > LINKED).astype(float)
    walk_SS = links_SS / np.maximum(links_SS.sum(1, keepdims=True), 1.0)
    rank_S = np.full(len(x_SD), 1 / len(x_SD))
    for _ in range(100):
        rank_S = (1 - DAMPING) / len(x_SD) + DAMPING * rank_S @ walk_SS
    return int(np.argmax(rank_S))


def centroid(x_SD: np.ndarray) -> int:
    return int(np.argmax(x_SD @ x_SD.mean(0)))


def written(task: str, data: LanguageData) -> dict[str, list[str]]:
    """The texts of every rival for the test's records."""
    test = data.test
    if task == "answer":
        writer, _ = Passage.fit(data.train)
        return {"lexical": [str(p.value) for p in writer.write(test)]}
    tfidf = TfidfVectorizer(sublinear_tf=True).fit([s for r in data.train for s in sentences(r.source)])
    found = {f"lead-{n}": [str(p.value) for p in Lead(n).write(test)] for n in (1, 2, 3)}
    found |= {
        "lexrank": one_sentence(test, tfidf.transform, lexrank),
        "centroid": one_sentence(test, tfidf.transform, centroid),
    }
    encoder = next(iter(default_encoders()), None)
    if encoder is not None:
        found["embedding"] = one_sentence(test, encoder_features(encoder, "cpu"), centroid)
    return found


def compared(task: str, metrics: Sequence[str], source: Path, run: Path, seed: int) -> Row:
    """Of each rival and metric: its value on test, what the run's model is better by, the standard error of that, one-sided p."""
    data = load_language(source, task=task, seed=seed)
    bundle = multistep.load(run).language
    references = [r.targets for r in data.test]
    ours = [str(p.value) for p in bundle.answer(data.test)]
    found: Row = {}
    for name, texts in written(task, data).items():
        found[name] = {}
        for metric in metrics:
            c = compare_rows(metric, statistics(metric, ours, references), statistics(metric, texts, references), seed)
            found[name][metric] = {"value": c.incumbent, "better_by": c.difference, "stderr": c.stderr, "p": c.p}
    return found
