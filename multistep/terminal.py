"""The border of the command line: options that verbs share, checks before torch is imported, output, and how errors end a command.

Results go to standard output, all else to standard error; with --json standard output is exactly one JSON object.
Exit codes: 0 done, 1 a journal that does not replay, 2 bad input (one line, no traceback), 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import BaseModel

from multistep.files import read_info
from multistep.launch import assists
from multistep.types import Interrupted, MetricValue, Prediction, UserError

if TYPE_CHECKING:
    from multistep.api import Run

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing until the end.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder that fit wrote (--out).")]


# ---------------------------------------------------------------------------------------------- ends


def failed(message: str, as_json: bool) -> int:
    line = " ".join(message.split())
    typer.echo(f"error: {line}", err=True)
    if as_json and not assists():
        print_json({"error": line})
    return 2


def interrupted(stop: Interrupted, out: str, as_json: bool) -> NoReturn:
    """Say how to go on, and leave with the signal's exit code."""
    if assists():
        raise typer.Exit(128 + stop.signal)
    typer.echo(f"saved; resume with `multistep resume {out}`", err=True)
    if as_json:
        print_json({"interrupted": signal.Signals(stop.signal).name, "out": out})
    raise typer.Exit(128 + stop.signal)


@contextlib.contextmanager
def stdout_is_stderr() -> Iterator[None]:
    """Libraries that print notes while they work print them to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


# ---------------------------------------------------------------------------------------------- runs and texts


def check_run(run_dir: Path) -> None:
    """Before torch is imported: a folder with a journal. Raises UserError."""
    check_folder(run_dir)
    if not (run_dir / "journal.jsonl").is_file():
        raise UserError(f"{run_dir}: no journal.jsonl there, so it is not a run. Give the folder named by fit --out.")


def check_bundle(run_dir: Path) -> None:
    """Before torch is imported: a run with a model, or a model's own folder. Raises UserError."""
    check_folder(run_dir)
    if (run_dir / "multistep.json").is_file() or (run_dir / "model" / "multistep.json").is_file():
        return
    check_run(run_dir)
    raise UserError(f"{run_dir}: the run has no model yet. Go on with it: multistep resume {run_dir}.")


def check_folder(run_dir: Path) -> None:
    if not os.path.lexists(run_dir):
        raise UserError(f"{run_dir}: no such folder. Give the folder named by fit --out.")
    if not os.path.isdir(run_dir):
        raise UserError(f"{run_dir}: not a folder. Give the folder named by fit --out.")


def load(run_dir: Path) -> Run:
    check_bundle(run_dir)
    from multistep.api import load as load_run

    return load_run(run_dir)


def is_language(run_dir: Path) -> bool:
    """Whether its answers are texts."""
    return bool(_info(run_dir).get("language"))


def _info(run_dir: Path) -> dict[str, Any]:
    model = run_dir / "model"
    return read_info(model if (model / "multistep.json").is_file() else run_dir)


def lines_in(asking: bool) -> Iterator[str]:
    """The lines of standard input; on a terminal after a mark."""
    while True:
        try:
            yield input("> " if asking else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("standard input: not UTF-8. Convert it first.") from None


def texts_of(argument: str, run_dir: Path) -> list[str]:
    """The texts to predict: standard input, a file's, or the argument itself. Raises UserError."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise UserError("the text: not UTF-8. Set the terminal to UTF-8.") from None
    from multistep.data import Columns, read_texts

    info = _info(run_dir)
    columns = Columns.parse(info["columns"], "columns") if info.get("columns") else None
    return read_texts(argument, columns)


# ---------------------------------------------------------------------------------------------- output


def show_run(run: Run, as_json: bool) -> None:
    if as_json:
        print_json({**run.summary(), "out": str(run.out)})
        return
    from multistep.report.explain import headline

    typer.echo(headline(run.summary()))
    typer.echo(f'Try: multistep predict {run.out} "a text"  ·  multistep explain {run.out}')


def answer(p: Prediction) -> tuple[str, str]:
    """Value and confidence as text; of a withheld answer the candidates, after a question mark."""
    if p.abstains:
        value = "?" + "|".join(p.candidates or ())
    elif isinstance(p.value, tuple):
        value = ",".join(p.value)
    else:
        value = f"{p.value:.6g}" if isinstance(p.value, float) else str(p.value)
    return value, "" if p.confidence is None else f"{p.confidence:.4f}"


def print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(plain(value), ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """Anything that a result may hold, as JSON has it. Not-a-number becomes null."""
    if isinstance(value, MetricValue):
        return {"value": plain(value.value), "stderr": plain(value.stderr)}
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Prediction):
        found = {"value": plain(value.value), "confidence": plain(value.confidence), "scores": plain(value.scores)}
        if value.stage:
            found["stage"] = value.stage
        if value.candidates is not None:
            found |= {"candidates": list(value.candidates), "abstains": value.abstains}
        return found
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value) if isinstance(value, Path) else plain(value.tolist())  # numpy
