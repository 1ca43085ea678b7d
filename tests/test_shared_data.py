"""The public datasets as they are: what is counted in them is what their own pages say."""

from __future__ import annotations

from pathlib import Path

import pytest

from multistep import data

pytestmark = pytest.mark.data


def test_banking77(shared: Path) -> None:
    found = data.load(shared / "data" / "banking77")
    assert (len(found.train), len(found.control) + len(found.calibration), len(found.test)) == (9000, 1003, 3080)
    assert len(found.labels) == 77
    assert found.report.leakage["train-test"].count == 6  # five to the letter, one more without regard to case


def test_chnsenticorp_leaks_and_the_leaks_decide_nothing(shared: Path) -> None:
    found = data.load(shared / "data" / "chnsenticorp")
    assert found.report.leakage["train-test"].count >= 331
    train = {e.text for e in found.train}
    assert not [e for e in (*found.control, *found.calibration) if e.text in train]
    assert len(found.test) == 1200
