"""Tables of language data by split: what read.py reads, and also plain text, line-aligned files and SQuAD's nested JSON.

Plain text is cut into pieces that give the text back, to the character, when joined: at blank lines, or where these are few, in blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from multistep.data import read
from multistep.data.read import Row
from multistep.types import UserError

BLOCK = 2048  # characters, of a text without blank lines
_MIN_DOCUMENTS = 20  # fewer pieces between blank lines are no documents ...
_LARGEST = 0.05  # ... and neither are they when one of them is a larger share of the whole
_DOCUMENT = re.compile(r".*?(?:\r?\n[ \t]*){2,}(?=\S)|.+", re.DOTALL)
_BRACES = re.compile(r"(?P<head>.*)\{(?P<a>[^{},]+),(?P<b>[^{},]+)\}(?P<tail>[^{}]*)")
_SUFFIX = re.compile(r"[A-Za-z]{2,8}([_-][A-Za-z]{2,4})?")


class Tables(NamedTuple):
    """`rows` as `read_rows` gives them. `plain`: of text files, how they were cut; a running text then, "text" its one column."""

    rows: dict[str, list[Row]]
    plain: str = ""


def read_tables(source: str | Path, text: Sequence[str] = (), only: str = "") -> Tables:
    """Rows by split. Unlike for labels a folder need not hold a train file: records.py finds one then. `only`: as `read_rows` has it."""
    path = Path(source)
    if read.exists(path):
        return _folder(path, text, only) if path.is_dir() else _file(path)
    if match := _BRACES.fullmatch(str(source)):
        names = (match["a"].strip(), match["b"].strip())
        files = [Path(f"{match['head']}{name}{match['tail']}") for name in names]
        return Tables({read.WHOLE: aligned(files, names)})
    return Tables({split: _flat(rows, source) for split, rows in read.read_rows(source, only).items()})


def is_plain(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".txt")


def read_one(path: Path) -> list[Row]:
    """The rows of one table, SQuAD's nested one too."""
    return _flat(read.read_file(path), path)


def _file(path: Path) -> Tables:
    if not is_plain(path):
        return Tables({read.WHOLE: read_one(path)})
    pieces, how = cut(read.read_plain(path))
    return Tables({read.WHOLE: [{"text": piece} for piece in pieces]}, how)


def _folder(folder: Path, text: Sequence[str], only: str) -> Tables:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Tables({split: _flat(rows, folder) for split, rows in read.read_rows(folder, only).items()})
    if files := read.split_files(folder):
        wanted = {split: paths for split, paths in files.items() if not only or split == only}
        return Tables({split: [row for p in paths for row in read_one(p)] for split, paths in wanted.items()})
    plain = {s: p for p in sorted(folder.iterdir()) if is_plain(p) and (s := read.split_named(_stem(p)[0]))}
    if plain:
        parts = {split: cut(read.read_plain(path)) for split, path in plain.items()}
        rows: dict[str, list[Row]] = {split: [{"text": p} for p in pieces] for split, (pieces, _) in parts.items()}
        return Tables(rows, parts.get("train", next(iter(parts.values())))[1])
    if sides := _sides(folder, text):
        return Tables({split: aligned([paths[n] for n in paths], tuple(paths)) for split, paths in sides.items()})
    return Tables(read.read_rows(folder, only))  # which says what is missing


def _stem(path: Path) -> tuple[str, str]:
    """("train", "de") of train.de and of train.de.gz."""
    stem, _, suffix = path.name.removesuffix(".gz").rpartition(".")
    return stem, suffix


def _sides(folder: Path, text: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Line-aligned files: split -> language -> file. English, or what --text names, is the side to start from."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        stem, suffix = _stem(path)
        if _SUFFIX.fullmatch(suffix) and not read.file_format(path) and (split := read.split_named(stem)):
            found.setdefault(split, {})[suffix] = path
    for split, paths in found.items():
        if len(paths) != 2:
            names = ", ".join(p.name for p in paths.values())
            raise UserError(
                f"{folder}: two line-aligned files make the {split} split, here: {names}. Keep two of them."
            )
        first = text[0] if text and text[0] in paths else "en" if "en" in paths else min(paths)
        found[split] = {name: paths[name] for name in sorted(paths, key=lambda n: (n != first, n))}
    return found


def aligned(files: Sequence[Path], names: Sequence[str]) -> list[Row]:
    """Rows of two files whose lines belong together."""
    left, right = (read.read_lines(path) for path in files)
    if len(left) == len(right):
        return [dict(zip(names, pair, strict=True)) for pair in zip(left, right, strict=True)]
    short, long = (0, 1) if len(left) < len(right) else (1, 0)
    n, more = len((left, right)[short]), (left, right)[long]
    odd = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False), 1) if bool(a.strip()) != bool(b.strip())), None
    )
    hint = f"; line {odd} is empty in one of them only" if odd else ""
    extra = more[n] if len(more[n]) <= 40 else more[n][:37] + "..."
    raise UserError(
        f"{files[0]} has {len(left):,} lines, {files[1].name} {len(right):,}{hint}; the first line without a partner is line "
        f"{n + 1:,} of {files[long].name}: {extra!r}. Lines must belong together; align the files again."
    )


# ---------------------------------------------------------------------------------------------- plain text, SQuAD


def cut(text: str) -> tuple[list[str], str]:
    """Pieces that join to `text`, and in words what they are."""
    documents = documents_of(text)
    if len(documents) >= _MIN_DOCUMENTS and max(map(len, documents)) <= max(BLOCK, _LARGEST * len(text)):
        return documents, f"{len(documents):,} pieces between blank lines"
    blocks = blocks_of(text)
    return blocks, f"one stream, cut in {len(blocks):,} blocks of about {min(BLOCK, len(text)):,} characters"


def documents_of(text: str) -> list[str]:
    """Pieces that end with their blank lines."""
    return _DOCUMENT.findall(text)


def blocks_of(text: str) -> list[str]:
    """Blocks of at most `BLOCK` characters (fewer if the text is short) that end with a line, else a word, where they can."""
    size = max(1, min(BLOCK, len(text) // 40))
    blocks, start = [], 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            least = start + size // 2
            line, word = text.rfind("\n", least, end), text.rfind(" ", least, end)
            end = line + 1 if line >= 0 else word + 1 if word >= 0 else end
        blocks.append(text[start:end])
        start = end
    return blocks


def _flat(rows: list[Row], where: str | Path) -> list[Row]:
    """SQuAD's articles of paragraphs of questions to a row a question; other rows as they are."""
    if not rows or not isinstance(rows[0].get("paragraphs"), list):
        return rows
    flat = []
    for number, article in enumerate(rows, 1):
        try:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    row = {
                        "id": qa.get("id"),
                        "context": paragraph["context"],
                        "question": qa["question"],
                        "answers": qa.get("answers"),
                    }
                    flat.append(row | {k: qa[k] for k in ("is_impossible",) if k in qa})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: article {number}: not as SQuAD has it ({type(error).__name__}: {error}). "
                "Each has paragraphs, each of them a context and qas with question and answers."
            ) from None
    return flat
