"""Rows to train | control | calibration | test: stratified by label, equal texts on one side, the same for the same seed.

Texts are equal when they agree after case folding and collapsing white space. Rows of one text form a group that is never
torn. Groups are ordered by stratum (shuffled inside) and taken at an even rate with the remainder carried on, so that every
class gives its share, rounded, and the total is exact.
Rows of splits that came as files are never moved; validation rows that also occur in train do not decide anything.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Set as AbstractSet
from hashlib import blake2b
from typing import Any, NamedTuple

from multistep.types import TaskKind, UserError

_SHARE = 10  # one row of ten for validation, one for test
NO_TEST = "no test split, as asked: every row is for training and validation"
_SMALL = 20  # ... but at least so many, if that leaves half of the data for training
_STRATA = 10  # of a regression's targets


class Item(NamedTuple):
    """A row that can be used, and where it came from."""

    split: str  # as read: "all", "train", "validation", "test"
    number: int  # of the row in its file, from 1
    text: str
    label: Any
    key: bytes  # equal for equal texts
    words: int
    group: bytes = b""  # rows of one group stay together when a split is made; b"": those of equal text do

    @property
    def kin(self) -> bytes:
        return self.group or self.key


class Splits(NamedTuple):
    train: list[Item]
    validation: list[Item]  # before rows that occur in train are left out
    control: list[Item]
    calibration: list[Item]
    test: list[Item]
    notes: list[str]


def normalised(text: str) -> tuple[bytes, int]:
    """The key under which equal texts meet, and the number of words."""
    words = text.casefold().split()
    return blake2b(" ".join(words).encode(), digest_size=16).digest(), len(words)


def make_splits(given: dict[str, list[Item]], task: TaskKind, seed: int, where: str, test: bool = True) -> Splits:
    """`given`: items by split as read. What is missing is made from train (or from the only file); without `test`, no test."""
    notes: list[str] = [] if test else [NO_TEST]
    train = given["train"] if "train" in given else given["all"]
    deciding = without(train, given["validation"], where, notes) if "validation" in given else []
    held = max(len(train) // _SHARE, min(_SMALL, len(train) // 4))
    parts = dict(given)
    for split, other in (("test", "validation"), ("validation", "test")):
        if split in given:
            continue
        if split == "test" and not test:
            parts[split] = []
            continue
        n = len(train)
        barred = {item.kin for item in given.get(other, [])}
        train, parts[split] = divide(train, held, task, f"{seed}/{split}", barred=barred, cover=True)
        if len({item.key for item in parts[split]}) < 2:
            each = "" if task == "regress" else " per label"
            raise UserError(
                f"{where}: too few different rows{each} to make a {split} split. Add rows or a {split} file."
            )
        notes.append(f"{split} made from train: {len(parts[split]):,} of {n:,} rows")
    if len(parts) > len(given) and held < _SMALL:
        notes.append(f"small data: only {held} rows a held-out split, so every score is uncertain")
    if "validation" not in given:
        deciding = parts["validation"]
    calibration, control = divide(deciding, (len(deciding) + 1) // 2, task, f"{seed}/control")
    if not control or not calibration:  # one text repeated
        raise UserError(f"{where}: the validation split cannot be halved, its texts are too alike. Add different rows.")
    return Splits(train, parts["validation"], control, calibration, parts["test"], notes)


def without(train: list[Item], validation: list[Item], where: str, notes: list[str]) -> list[Item]:
    """Validation rows that may decide something: those whose text is not in train."""
    seen = {item.key for item in train}
    clean = [item for item in validation if item.key not in seen]
    if len(clean) < len(validation):
        left_out = len(validation) - len(clean)
        notes.append(f"{left_out:,} validation rows occur in train: left out of control and calibration")
    if len({item.key for item in clean}) < 2:
        raise UserError(
            f"{where}: of {len(validation)} validation rows {len(clean)} are not in train, and two halves are needed. "
            "Add rows, or remove the validation file and one is made."
        )
    return clean


def divide(
    items: list[Item],
    rows: int,
    task: TaskKind,
    seed: str,
    *,
    barred: AbstractSet[bytes] = frozenset(),
    cover: bool = False,
) -> tuple[list[Item], list[Item]]:
    """(rest, taken) with about `rows` taken, both in file order. Keys in `barred` stay; `cover`: every label stays too."""
    groups: dict[bytes, list[Item]] = {}
    for item in items:
        groups.setdefault(item.kin, []).append(item)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    kept = set(barred)
    if cover and task != "regress":
        kept |= _one_of_each_label(keys, groups)
    pool = [key for key in keys if key not in kept and len(groups[key]) <= rows]
    stratum = _strata(pool, groups, task)
    pool.sort(key=lambda key: stratum[key])  # stable: shuffled inside a stratum
    rate = rows / max(1, sum(len(groups[key]) for key in pool))
    taken: set[bytes] = set()
    debt = 0.0
    for key in pool:
        size = len(groups[key])
        debt += rate * size
        if debt >= size / 2:
            debt -= size
            taken.add(key)
    return [i for i in items if i.kin not in taken], [i for i in items if i.kin in taken]


def _one_of_each_label(keys: list[bytes], groups: dict[bytes, list[Item]]) -> set[bytes]:
    first: dict[str, bytes] = {}
    for key in keys:
        for item in groups[key]:
            for label in item.label if isinstance(item.label, tuple) else (item.label,):
                first.setdefault(label, key)
    return set(first.values())


def _strata(keys: list[bytes], groups: dict[bytes, list[Item]], task: TaskKind) -> dict[bytes, Any]:
    """classify: the label; multilabel: the rarest label of the row; regress: the tenth of the targets it falls in."""
    labels = {key: groups[key][0].label for key in keys}
    if task == "regress":
        ranked = sorted(keys, key=lambda key: labels[key])
        return {key: rank * _STRATA // len(keys) for rank, key in enumerate(ranked)}
    if task == "multilabel":
        count = Counter(label for key in keys for label in labels[key])
        return {key: min(labels[key], key=lambda label: (count[label], label), default="") for key in keys}
    return labels
