"""Files, folders and hub names to rows (dicts). Nothing is guessed here about which column means what.

CSV, TSV, JSON lines and JSON arrays (each also .gz) are read with the standard library, Parquet with pyarrow, folders saved
by `datasets` and hub names with `datasets`; the last two are imported only when asked for, so that importing this is cheap.
Whatever is wrong with a file becomes one line that names the file, the line and the mend.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multistep.data.saved import SPLITS, WHOLE, Row, one_line, parquet, read_hub, read_saved
from multistep.types import UserError

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_MANY = 8  # rows beside other things, by whatever name: fewer may be the answers or choices of one row
# what an object may call the rows that it holds beside a few other things; a short list by another name belongs to a row
_WRAPPERS = ("data", "dataset", "entries", "examples", "instances", "items", "records", "rows", "samples")
_SPLIT_FILE = re.compile(rf"({'|'.join(SPLITS)})(-\d+-of-\d+)?(?:-v\d[\d.]*)?")  # shards; versions (train-v2.0)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# characters in one CSV field; the standard library's own limit (131,072) is below real documents
_FIELD_LIMIT = 1 << 24
_READS = "Readable: " + ", ".join(FORMATS) + " (each also .gz)"


def read_rows(source: str | Path, only: str = "") -> dict[str, list[Row]]:
    """Rows by split: {"all": rows} for a single file or table, else those of "train", "validation", "test" that exist. `only`: the one
    split that is read; there need be no train then, nor that split itself."""
    path = Path(source)
    if exists(path):
        return _read_folder(path, only) if path.is_dir() else {WHOLE: read_file(path)}
    if file_format(path) is None and _HUB_NAME.fullmatch(str(source)):
        return read_hub(str(source), only)
    raise missing_file(path)


def read_file(path: Path) -> list[Row]:
    """The rows of one file, at least one."""
    kind = file_format(path)
    if kind is None:
        raise UserError(f"{path}: unknown kind of file. {_READS}.")
    data = _bytes(path)
    if kind == ".parquet":
        rows = parquet(data, path)
    elif kind in (".csv", ".tsv"):
        rows = _table(decode(data, path), path, "," if kind == ".csv" else "\t")
    else:
        rows = _json(decode(data, path), path, lines=kind != ".json")
    if not rows:
        raise UserError(f"{path}: no rows, only a header or blank lines. Give a file with data in it.")
    return rows


def read_lines(path: Path) -> list[str]:
    """A plain text file, one text a line. Blank lines inside are texts too, so that answers keep the order of lines."""
    return lines_of(read_plain(path))


def read_plain(path: Path) -> str:
    """A plain text file (also .gz) as it is."""
    return decode(_bytes(path), path)


def read_stdin() -> list[str]:
    return lines_of(decode(sys.stdin.buffer.read(), Path("standard input")))


def lines_of(text: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder that are splits, by split; several files only if they are shards (train-00000-of-00002)."""
    found: dict[str, list[Path]] = {}
    whole: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        kind = file_format(path)
        match = kind and _SPLIT_FILE.fullmatch(path.name.lower().removesuffix(".gz").removesuffix(kind))
        if not match:
            continue
        split = SPLITS[match[1]]
        if split in whole or (split in found and not match[2]):
            first = whole.get(split, found[split][0])
            raise UserError(
                f"{folder}: both {first.name} and {path.name} could be the {split} split. Keep one of them."
            )
        if not match[2]:
            whole[split] = path
        found.setdefault(split, []).append(path)
    return found


def split_named(name: str) -> str | None:
    """The split that a file name without its ending stands for: "dev" is validation."""
    match = _SPLIT_FILE.fullmatch(name.lower())
    return SPLITS[match[1]] if match else None


def file_format(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in FORMATS if name.endswith(kind)), None)


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        raise UserError(f"{path}: permission denied. Give yourself the right to read it.") from None
    except (OSError, ValueError):  # too long for a file name, or with a NUL: some text, not a path
        return False


def missing_file(path: Path) -> UserError:
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if exists(parent) and parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    mend = f"Did you mean {parent / close[0]}?" if close else "Check the path."
    return UserError(f"{path}: no such file or folder. {mend}")


# ---------------------------------------------------------------------------------------------- bytes


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise missing_file(path) from None
    except PermissionError:
        raise UserError(f"{path}: permission denied. Give yourself the right to read it.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Check the file.") from None
    if not data:
        raise UserError(f"{path}: the file is empty (0 bytes). Was the download or export cut short?")
    if data[:2] != b"\x1f\x8b":
        if path.name.lower().endswith(".gz"):
            raise UserError(f"{path}: named .gz but not gzip. Rename it, or compress it with gzip.")
        return data
    try:
        data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip ({error}). Fetch or compress it again.") from None
    if not data:
        raise UserError(f"{path}: nothing inside the gzip (0 bytes). Was the download or export cut short?")
    return data


def decode(data: bytes, path: Path) -> str:
    """UTF-8 (with or without a byte-order mark) to text; any other encoding is an error that says where."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: encoded as UTF-16. Save it as UTF-8 (iconv -f UTF-16 -t UTF-8).")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            data.decode()  # again without the mark's handling, for the true offset
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"{path}: line {line}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8. "
                "Save the file as UTF-8 (for example: iconv -f LATIN1 -t UTF-8)."
            ) from None
        raise
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}: line {line}: a NUL byte. The file is binary or damaged; save it as plain text.")
    return text


# ---------------------------------------------------------------------------------------------- CSV and TSV


def _table(text: str, path: Path, delimiter: str) -> list[Row]:
    header_line = text[: text.find("\n")] if "\n" in text else text
    if delimiter == "," and "," not in header_line:  # spreadsheets of many countries write ; into .csv
        delimiter = next((d for d in (";", "\t") if d in header_line), ",")
    if delimiter != "\t" or '"' not in text:
        return _quoted(text, path, delimiter, quoting=csv.QUOTE_MINIMAL)
    # Half of the world's TSV quotes fields, the other half has bare quotes in its texts. When every line has the right
    # number of tabs and quoting would join lines (or fails), quotes are bare.
    try:
        quoted, problem = _quoted(text, path, delimiter, quoting=csv.QUOTE_MINIMAL), None
    except UserError as error:
        quoted, problem = [], error
    try:
        bare = _quoted(text, path, delimiter, quoting=csv.QUOTE_NONE)
    except UserError:
        if problem:
            raise problem from None
        return quoted
    return bare if len(bare) > len(quoted) else quoted


def _quoted(text: str, path: Path, delimiter: str, quoting: Any) -> list[Row]:
    before = csv.field_size_limit(_FIELD_LIMIT)
    try:
        return list(_records(text, path, delimiter, quoting))
    finally:
        csv.field_size_limit(before)


def _records(text: str, path: Path, delimiter: str, quoting: Any) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] = []
    line = 1  # where the record being read begins
    try:
        for fields in reader:
            if not fields:
                pass  # a blank line
            elif not header:
                header = _header(fields, path)
            elif len(fields) != len(header):
                raise UserError(
                    f"{path}: line {line}: {len(fields)} fields where the header has {len(header)}. "
                    f"Quote fields that contain {'a tab' if delimiter == chr(9) else repr(delimiter)} or a line break."
                )
            else:
                yield dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        mend = 'Is a quote opened and never closed? A quote inside a quoted field is written twice ("").'
        raise UserError(f"{path}: line {line}: {error}. {mend}") from None


def _header(fields: list[str], path: Path) -> list[str]:
    names = [name.strip() or f"column {i}" for i, name in enumerate(fields, 1)]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"{path}: line 1: the header names {twice!r} twice. Give every column its own name.")
    return names


# ---------------------------------------------------------------------------------------------- JSON


def _json(text: str, path: Path, lines: bool) -> list[Row]:
    if not lines and text.lstrip()[:1] == "[":
        try:
            rows = _whole_characters(json.loads(text), text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({one_line(error)}). Mend the file there.") from None
        for number, row in enumerate(rows, 1):
            _check_object(row, path, f"element {number}")
        return rows
    if not lines and (rows := _rows_of_object(text)):
        return rows
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            row = _whole_characters(json.loads(line), line)
        except (ValueError, RecursionError) as error:
            mend = "Every line must be one whole JSON object" if lines else "Give a JSON array or one object a line"
            raise UserError(f"{path}: line {number}: not valid JSON ({one_line(error)}). {mend}.") from None
        _check_object(row, path, f"line {number}")
        rows.append(row)
    return rows


def _rows_of_object(text: str) -> list[Row]:
    """Of a file that is one object: the rows that it wraps, as SQuAD's {"version": ..., "data": [...]} does, else itself. [] for anything
    else."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(whole, dict):
        return []
    tables = [name for name, value in whole.items() if _is_table(value)]
    if len(tables) != 1:
        return _whole_characters([whole], text)
    rows = whole[tables[0]]
    talk = any("role" in row or {"from", "value"} <= row.keys() for row in rows)
    wrapped = tables[0].strip().lower() in _WRAPPERS or (not talk and (len(whole) == 1 or len(rows) >= _MANY))
    return _whole_characters(rows if wrapped else [whole], text)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(row, dict) for row in value)


def _check_object(row: Any, path: Path, where: str) -> None:
    if not isinstance(row, dict):
        what = {list: "a list", str: "a string", type(None): "null", bool: "a truth value"}.get(type(row), "a number")
        raise UserError(f'{path}: {where}: {what}, not an object. Write rows as {{"text": ..., "label": ...}}.')


def _whole_characters(value: Any, source: str) -> Any:
    r"""JSON may hold half of a surrogate pair ("\ud83d"), which no encoder and no tokenizer takes: it becomes '?'."""
    if "\\ud" not in source and "\\uD" not in source:
        return value
    return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


# ---------------------------------------------------------------------------------------------- folders


def _read_folder(folder: Path, only: str) -> dict[str, list[Row]]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return read_saved(folder, only)
    files = split_files(folder)
    if only:
        files = {split: paths for split, paths in files.items() if split == only}
    elif "train" not in files:
        names = sorted(p.name for p in folder.iterdir() if file_format(p))
        seen = f"found {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "found no data file"
        raise UserError(f"{folder}: no train file ({seen}). Name one train.csv (or {', '.join(FORMATS[1:])}, .gz).")
    return {split: [row for path in paths for row in read_file(path)] for split, paths in files.items()}
