"""What the scikit-learn estimators are given: texts and labels in any of the forms that scikit-learn's users have them, checked.

Shapes: N texts, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from multistep.data.dataset import MIN_ROWS
from multistep.data.labels import to_labels
from multistep.types import UserError


class Labels(NamedTuple):
    """Labels of N rows: `codes` are places in `classes`, one a row when the form is "one"."""

    classes: np.ndarray
    codes: list[tuple[int, ...]]
    form: str  # "one", "indicator", "tuples"


def texts_of(X: Any, name: str) -> list[str]:
    """A list, array or column of texts. Raises UserError that names the first row which is none."""
    if isinstance(X, str):
        raise UserError(f'{name}: X is one text. Give a list of texts, such as ["great film"].')
    if sparse.issparse(X):
        raise UserError(f"{name}: X is a sparse matrix. Give the texts themselves, without a vectorizer before.")
    cells = np.asarray(X, dtype=object)
    if cells.ndim == 2 and cells.shape[1] == 1:
        cells = cells[:, 0]
    if cells.ndim != 1:
        raise UserError(f"{name}: X has shape {cells.shape}. Give texts: a list, a Series, an array (n,) or (n, 1).")
    if not len(cells):
        raise UserError(f"{name}: X has 0 sample(s), while a minimum of 1 is required.")
    for row, cell in enumerate(cells):
        if not isinstance(cell, str):
            what = "missing" if is_missing(cell) else f"a {type(cell).__name__}, not a text"
            raise UserError(f"{name}: X[{row}] is {what} ({str(cell)[:40]}). Every row must be a str.")
    return [whole(cell) for cell in cells]


def whole(text: str) -> str:
    """Half of a surrogate pair, which no tokenizer takes, becomes '?', as it does in files."""
    return text.encode(errors="replace").decode()


def is_missing(value: Any) -> bool:
    kind = type(value).__name__
    return value is None or kind in ("NAType", "NaTType") or (isinstance(value, float | np.floating) and value != value)


def usable_rows(texts: Sequence[str], name: str) -> list[int]:
    """Rows with a word in them: the others are left out of a run."""
    usable = [row for row, text in enumerate(texts) if text.split()]
    if len(usable) < MIN_ROWS:
        have = f"n_samples = {len(texts)}, of which {len(usable)} have text"
        raise UserError(f"{name}: {have}. At least {MIN_ROWS} are needed, better some hundreds.")
    return usable


def check_labels_given(y: Any, name: str) -> None:
    if y is None:
        raise UserError(f"{name} requires y to be passed, but the target y is None.")
    for row, label in enumerate(rows_of(y) or ()):
        if is_missing(label):
            raise UserError(f"{name}: y[{row}] is missing ({label}). Fill it in or leave the row out.")


def labels_of(y: Any, name: str) -> Labels:
    """What y says, in one of three forms. A list of lists is a matrix; a list of tuples is labels."""
    rows, several = rows_of(y), (tuple, list, set, frozenset)
    if rows and isinstance(rows[0], several) and not (isinstance(y, list | tuple) and isinstance(rows[0], list)):
        if not all(isinstance(row, several) for row in rows):
            raise UserError(f"{name}: some rows of y are tuples of labels, others are not. Give a tuple for every row.")
        known = sorted({label for row in rows for label in row})
        place = {label: k for k, label in enumerate(known)}
        return Labels(np.array(known), [tuple(sorted({place[label] for label in row})) for row in rows], "tuples")
    check_labels_given(y, name)
    y = check_array(y, dtype=None, ensure_2d=False, accept_sparse="csr", input_name="y")  # pyright: ignore[reportArgumentType]
    check_classification_targets(y)
    if type_of_target(y) == "multilabel-indicator":
        y = y.toarray() if sparse.issparse(y) else y
        return Labels(np.arange(y.shape[1]), [tuple(np.flatnonzero(row).tolist()) for row in y], "indicator")
    classes, codes = np.unique(column_or_1d(y, warn=True), return_inverse=True)
    return Labels(classes, [(code,) for code in codes.tolist()], "one")


def rows_of(y: Any) -> list[Any] | None:
    """y as a list, or None where it has columns."""
    if isinstance(y, list | tuple):
        return list(y)
    cells = np.asarray(y, dtype=object)
    return cells.tolist() if cells.ndim == 1 else None


def check_enough(texts: Sequence[str], labels: Labels, name: str) -> None:
    """Rows and classes enough to learn from and to judge by. Rows without a word do not count."""
    usable = usable_rows(texts, name)
    seen = {code for row in usable for code in labels.codes[row]}
    if len(seen) < 2:
        only = f"only one class, {labels.classes[seen.pop()]!r}" if seen else "no label at all"
        raise UserError(f"{name}: {only} in y. At least two classes are needed.")
    if labels.form == "one" and 1.2 * len(seen) > len(usable):
        raise UserError(f"{name}: {len(seen)} classes in {len(usable)} rows. Too few rows a class to learn from.")


def class_names_of(classes: np.ndarray) -> list[str]:
    """A name for each class that a file keeps as it is: what a file makes of the label where that will do."""
    names = to_labels([str(label) for label in classes.tolist()], "classify", "y")
    if all(n is not None and n == whole(n) for n in names) and len(set(names)) == len(names):
        return names
    return [f"class {k}" for k in range(len(names))]
