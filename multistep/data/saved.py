"""What `datasets` knows: Parquet with its notes on classes, folders that it saved, names of the hub. It is imported only when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from multistep.types import UserError

Row = dict[str, Any]

WHOLE = "all"  # the name of the only split of a single file
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation",
          "val": "validation", "test": "test"}  # fmt: skip


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------------------------------------- Parquet


def parquet(data: bytes, path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow. Install it: pip install pyarrow.") from None
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or not Parquet ({one_line(error)}). Fetch or write it again.") from None
    return _named(rows, _class_names(table.schema.metadata or {}))


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Column -> names of its whole-number classes, as `datasets` notes them in the schema it writes."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        noted = {c: f["names"] for c, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
        return {c: names for c, names in noted.items() if isinstance(names, list)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _named(rows: list[Row], names: Mapping[str, list[str]]) -> list[Row]:
    """Whole-number classes to their names; -1 is how `datasets` writes "no label". A column that is not what was noted of it stays."""
    for column, classes in names.items():
        if all(column in row and _is_class(row[column], len(classes)) for row in rows):
            for row in rows:
                index = row[column]
                row[column] = None if index is None or index < 0 else classes[index]
    return rows


def _is_class(cell: Any, count: int) -> bool:
    return cell is None or (isinstance(cell, int) and not isinstance(cell, bool) and -1 <= cell < count)


# ---------------------------------------------------------------------------------------------- folders, the hub


def _datasets(source: object) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: reading this needs `datasets`. Install it: pip install datasets.") from None
    return datasets


def read_saved(folder: Path, only: str) -> dict[str, list[Row]]:
    datasets = _datasets(folder)
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder}: not a whole `datasets` folder ({one_line(error)}). Save it again.") from None
    return _from_datasets(saved, folder, only)


def read_hub(name: str, only: str) -> dict[str, list[Row]]:
    datasets = _datasets(name)
    import huggingface_hub  # comes with datasets

    unreachable = None
    if not datasets.config.HF_HUB_OFFLINE:
        try:  # first one quick question: load_dataset would retry for half a minute
            huggingface_hub.HfApi().dataset_info(name, timeout=10)
        except Exception as error:
            unreachable = error
    try:
        with _offline(datasets) if unreachable else nullcontext():  # what was fetched before is still there
            loaded = datasets.load_dataset(name)
    except Exception as error:
        mend = "Check the name and the network, or give a file"
        raise UserError(
            f"{name}: no such file or folder here, and the hub did not give it ({one_line(unreachable or error)}). {mend}."
        ) from None
    return _from_datasets(loaded, name, only)


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """What is not in the cache of `datasets` is an error at once."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _from_datasets(loaded: Any, source: object, only: str) -> dict[str, list[Row]]:
    datasets = _datasets(source)
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {WHOLE: loaded}
    splits: dict[str, list[Row]] = {}
    for name, part in parts.items():
        split = WHOLE if name == WHOLE else SPLITS.get(name.lower())
        if split is not None and len(part) and (not only or split in (only, WHOLE)):
            names = {c: f.names for c, f in part.features.items() if isinstance(f, datasets.ClassLabel)}
            splits[split] = _named(part.to_list(), names)
    if not only and "train" not in splits and WHOLE not in splits:
        raise UserError(f"{source}: no rows in a train split (splits: {', '.join(parts)}). Save one named train.")
    return splits
