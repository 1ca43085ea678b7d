"""The data of `make demo`: docstrings of this machine's own Python standard library, read with `ast`, never imported.

Task: which package does this text document? Nothing to download, and the texts are real.
"""

from __future__ import annotations

import ast
import csv
import inspect
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from multistep.types import UserError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_MIN_CHARACTERS = 20
_MIN_ROWS = 60  # packages with fewer docstrings are left out


def demo_rows() -> list[dict[str, str]]:
    """{"text", "label"} for every docstring, in the order of files and lines."""
    library = Path(sysconfig.get_path("stdlib"))
    rows: list[dict[str, str]] = []
    for label, sources in _sources(library).items():
        texts = [text for source in sources for text in _docstrings(source)]
        if len(texts) >= _MIN_ROWS:
            rows += [{"text": text, "label": label} for text in texts]
    if not rows:
        raise UserError(f"{library}: no Python sources of the standard library there. Give a data file of your own.")
    return rows


def write_demo(path: Path) -> None:
    """Write `demo_rows()` as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows((row["text"], row["label"]) for row in demo_rows())


def _sources(library: Path) -> dict[str, list[str]]:
    """Package or module -> its sources, where there are triple quotes enough for the docstrings wanted (parsing is slow)."""
    sources: dict[str, list[str]] = {}
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                label = path.relative_to(library).parts[0].removesuffix(".py")
                sources.setdefault(label, []).append(path.read_text(encoding="utf-8", errors="replace"))
    wanted = {k: v for k, v in sources.items() if sum(map(_triple_quotes, v)) >= _MIN_ROWS}
    return dict(sorted(wanted.items()))


def _triple_quotes(source: str) -> int:
    return source.count('"""') + source.count("'''")


def _docstrings(source: str) -> Iterator[str]:
    if not _triple_quotes(source):
        return
    try:
        module = ast.parse(source)
    except SyntaxError:  # lib2to3 and its like keep files that are wrong on purpose
        return
    yield from _in_body(module.body)


def _in_body(body: Sequence[ast.stmt]) -> Iterator[str]:
    match body:
        case [ast.Expr(value=ast.Constant(value=str(text))), *_]:
            text = inspect.cleandoc(text)
            if len(text) >= _MIN_CHARACTERS and "\0" not in text:
                yield text
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _in_body(statement.body)
