"""A peer of course.py: the encoder as it is, mean of its last states at length 1, and logistic regression over C (SetFit without pairs).

Texts are read in random order, four of train to one of validation, cut and in the precision as peer_encoder.py has them, until all are
read or two thirds of the minutes are spent; C is walked most promising first, chosen on the validation rows, and the best is fitted
again on both.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from _peers import Fitted, Given, best_of
from peer_encoder import LONGEST, WHOLE
from peer_trainer import encoder_folder

READ = 2 / 3  # of the minutes, at most, for features
GRID = (10.0, 30.0, 3.0, 100.0, 1.0, 300.0, 0.3, 1000.0)
_TRAIN_AT_ONCE, _AT_ONCE, _SAMPLE, _TIMED_ROWS = 256, 64, 500, 32


@torch.no_grad()
def features(backbone: Any, tokenizer: Any, texts: list[str], length: int, bf16: bool) -> np.ndarray:
    """Mean of the last hidden states over real tokens, at length 1, [N,D]."""
    ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    order = np.argsort([len(row) for row in ids], kind="stable")
    found_ND = np.zeros((len(ids), backbone.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), _AT_ONCE):
        take = order[start : start + _AT_ONCE]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in take]}, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states_BTD = backbone(**batch).last_hidden_state.float()
        mask_BT1 = batch["attention_mask"][:, :, None].float()
        mean_BD = (states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        found_ND[take] = torch.nn.functional.normalize(mean_BD, dim=-1).numpy()
    return found_ND


def fit(given: Given) -> Fitted:
    clock, rng = given.clock, np.random.default_rng(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    backbone = AutoModel.from_pretrained(encoder_folder()).eval()
    order, order_v = (rng.permutation(len(labels)) for labels in (given.labels, given.labels_v))
    sizes = [len(ids) for ids in tokenizer([given.texts[i] for i in order[:_SAMPLE]])["input_ids"]]
    length = int(min(LONGEST, 8 * np.ceil(np.quantile(sizes, WHOLE) / 8)))
    spent: dict[bool, float] = {}
    for bf16 in (False, True, False, True):  # the first of each warms up
        begun = time.monotonic()
        features(backbone, tokenizer, [given.texts[i] for i in order[:_TIMED_ROWS]], length, bf16)
        spent[bf16] = time.monotonic() - begun
    faster = spent[True] < spent[False]

    parts: list[np.ndarray] = []
    parts_v: list[np.ndarray] = []
    at_v = max(1, min(_TRAIN_AT_ONCE // 4, _TRAIN_AT_ONCE * len(order_v) // len(order)))
    rounds = max(-(-len(order) // _TRAIN_AT_ONCE), -(-len(order_v) // at_v))
    chunk_s = 0.0
    for number in range(rounds):
        if clock.used_s + chunk_s > READ * clock.limit_s and parts:
            break
        begun = time.monotonic()
        for texts, which, size, to in (
            (given.texts, order, _TRAIN_AT_ONCE, parts),
            (given.texts_v, order_v, at_v, parts_v),
        ):
            take = which[number * size : (number + 1) * size]
            if len(take):
                to.append(features(backbone, tokenizer, [texts[i] for i in take], length, faster))
        chunk_s = time.monotonic() - begun
    x_ND, x_MD = np.concatenate(parts), np.concatenate(parts_v)
    y_N = np.array(given.labels)[order[: len(x_ND)]]
    y_M = np.array(given.labels_v)[order_v[: len(x_MD)]]
    encoded_s = clock.used_s

    scores: dict[int, float] = {}
    longest_s = 0.0
    for number, c in enumerate(GRID):
        if scores and clock.left_s < 2.5 * longest_s:  # this one and the refit
            break
        begun = time.monotonic()
        scores[number] = float((_head(c).fit(x_ND, y_N).predict(x_MD) == y_M).mean())
        longest_s = max(longest_s, time.monotonic() - begun)
    best = best_of(scores)
    head = _head(GRID[best])
    if clock.left_s > 1.25 * longest_s:
        head.fit(np.concatenate([x_ND, x_MD]), np.concatenate([y_N, y_M]))
    else:  # no time to add the validation rows
        head.fit(x_ND, y_N)

    def predict(texts: list[str]) -> list[str]:
        return [str(label) for label in head.predict(features(backbone, tokenizer, texts, length, faster))]

    facts = {"length": length, "bf16": faster, "read": len(x_ND), "read_validation": len(x_MD)}
    facts |= {"encoded_s": round(encoded_s, 1), "C": GRID[best], "tried": len(scores), "found": scores[best]}
    return Fitted(predict, facts)


def _head(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=300)
