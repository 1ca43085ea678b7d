"""Files, folders and hub names to examples in four splits, with a report of what is in them. No torch, quick to import."""

from multistep.data.columns import Columns
from multistep.data.dataset import Dataset, load, read_labelled, read_texts
from multistep.data.demo import demo_rows, write_demo
from multistep.data.read import read_rows
from multistep.data.report import DataReport

__all__ = [
    "Columns", "DataReport", "Dataset", "demo_rows", "load", "read_labelled", "read_rows", "read_texts", "write_demo",
]  # fmt: skip
