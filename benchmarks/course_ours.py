"""Our own systems in course.py: `multistep fit` as a user calls it, then what it answers to each example of the test.

A temporary folder has the dataset's train and validation; the feature cache is empty. As for the peers, the test comes after the minutes:
the run is told that there is none (`test=false`), and `multistep predict` says which examples are right. A running text has its test
within the minutes; the bundle's losses are read afterwards, and both must agree.
"""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from _common import Row, data_folder, load, multistep, publish_journal, rows_of_text
from course_rows import DOUBLE, OURS, TEXT, limit, nats_row, right_row, test_rows

_DISAGREE = 1e-4  # bits a byte, by which batches of other shapes may differ


def ours(system: str, dataset: str, budget_s: float, seed: int, most: int, journals: Path) -> Row:
    controller = system.removeprefix(OURS).removesuffix(DOUBLE)
    given_s = budget_s * (2 if system.endswith(DOUBLE) else 1)
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        place = Path(folder)
        out, take = place / "run", np.zeros(0, np.int64)
        if dataset == TEXT:
            data = _text_folder(place / dataset)
            options = ["--task", "lm", "--metric", "bits_per_byte"]
        else:
            take = test_rows(dataset, most)
            data = _folder(place / dataset, dataset)
            options = ["--task", "classify", "--metric", "accuracy", "--text", "text", "--label", "label", "test=false"]
        options += ["--budget", f"{given_s:g}s", "--seed", str(seed), "--controller", controller, "--out", str(out)]
        ran = multistep("fit", str(data), *options, limit_s=limit(given_s), cache=place / "cache")
        if (out / "journal.jsonl").exists():
            said = {str(data): f"DATA/{dataset}", folder: "TMP", str(data_folder(dataset)): f"DATA/{dataset}"}
            publish_journal(out, journals / f"{system}-{dataset}-{budget_s:g}s-{seed}.jsonl.gz", said)
        if ran.status:
            return {"ok": False, "status": ran.status, "wall_s": round(ran.wall_s, 2), "error": ran.stderr}
        row = (
            _nats(out, data, ran.payload)
            if dataset == TEXT
            else _right(out, _test(place, dataset, take), dataset, take)
        )
        return row | {"wall_s": round(ran.wall_s, 2), "given_s": given_s}


def _folder(folder: Path, dataset: str) -> Path:
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl.gz").symlink_to(data_folder(dataset).resolve() / f"{split}.jsonl.gz")
    return folder


def _test(folder: Path, dataset: str, take: np.ndarray) -> Path:
    """Those rows of the test, as a file."""
    with gzip.open(data_folder(dataset) / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    path = folder / "held.jsonl.gz"
    path.write_bytes(gzip.compress("".join(lines[i] for i in take).encode()))
    return path


def _text_folder(folder: Path) -> Path:
    """tinyshakespeare with nanoGPT's validation split as the test; validation is made from train."""
    folder.mkdir()
    for split, name in (("train", "train"), ("validation", "test")):
        (folder / f"{name}.jsonl.gz").symlink_to(data_folder(TEXT).resolve() / f"{split}.jsonl.gz")
    return folder


def _right(out: Path, test: Path, dataset: str, take: np.ndarray) -> Row:
    ran = multistep("predict", str(out), str(test), limit_s=1800)
    if ran.status:
        return {"ok": False, "status": ran.status, "error": f"predict: {ran.stderr}"}
    found = [str(p["value"]) for p in ran.payload["predictions"]]
    texts, labels = load(dataset, "test")
    row = right_row(dataset, found, take, texts, labels)
    info = json.loads((out / "model" / "multistep.json").read_text(encoding="utf-8"))
    stands = info["predictor"]
    return row | {
        "facts": {"stands": f"{stands['kind']} of {stands['model']}" if "model" in stands else stands["kind"]}
    }


def _nats(out: Path, data: Path, said: dict[str, Any]) -> Row:
    """`said`: by the run, with the bits a byte that it read; every character of this text is one byte."""
    from multistep import load as load_run
    from multistep.data.records import read_records
    from multistep.language_bundle import LanguageBundle

    bundle = load_run(out).bundle
    assert isinstance(bundle, LanguageBundle)
    records = read_records(data / "test.jsonl.gz", bundle.layout)
    losses_N3 = bundle.speaker.losses(records, bool(bundle.info["stream"]))
    assert losses_N3 is not None
    rows = rows_of_text(TEXT, "validation")
    if [r.targets[0] for r in records] != rows:
        return {"ok": False, "error": "the run's records are not the rows of the test"}
    row = nats_row(losses_N3[:, 0], rows)
    found = row["nats_a_character"] / math.log(2)
    read = (said.get("metrics") or {}).get("bits_per_byte", {}).get("value")  # none where its minutes were over before
    if read is not None and abs(found - read) > _DISAGREE:
        return {"ok": False, "error": f"the bundle's losses are {found:.5f} bits a byte, the run read {read:.5f}"}
    return row | {"facts": {"stands": bundle.info["standing"]["kind"]}}
