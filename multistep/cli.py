"""The command line: one verb a function, at most 12 options each. Torch is imported inside the verbs that need it.

Results go to standard output, all else to standard error; with --json standard output is exactly one JSON object.
Over 400 lines for it is one list of verbs and the border they share, read together.
Exit codes: 0 done, 2 bad input (one line, no traceback), 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import BaseModel
from typer.exceptions import TyperException

from multistep.report.progress import Progress
from multistep.types import Interrupted, MetricValue, Prediction, UserError

if TYPE_CHECKING:
    from multistep.api import Run

app = typer.Typer(
    name="multistep",
    help="A text dataset, a metric and a time budget in; a validated language model and the reasons for it out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# What a user can mend: a full disk, a folder that may not be written, a name that is a folder.
_USERS_OS_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EISDIR, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.EEXIST,
}  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing until the end.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder that fit wrote (--out).")]


@app.command()
def fit(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Data (file, folder, hub name) or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as optimizer.lr=1e-4.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="classify, multilabel or regress; inferred from the labels.")] = None,
    metric: Annotated[str | None, typer.Option(help="What decides: accuracy, f1_macro, mse ...")] = None,
    budget: Annotated[
        str | None, typer.Option(help="30s, 10m, 2h, '5000 updates' or '2e6 tokens'.  [default: 5m]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random choice.  [default: 0]")] = None,
    out: Annotated[str | None, typer.Option(help="The run's folder.  [default: runs/<name of the data>]")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text column; may be given several times.")] = None,
    label: Annotated[str | None, typer.Option(help="The label column.")] = None,
    model: Annotated[str | None, typer.Option(help="auto, lstm, none, or an encoder: a folder or a hub name.")] = None,
    controller: Annotated[str | None, typer.Option(help="staged, race or fixed.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a model from labelled texts within a budget."""
    started = time.monotonic()
    from multistep.config import resolve

    options = {
        "task": task, "metric": metric, "budget": budget, "seed": seed, "out": out,
        "text": tuple(text) if text else None, "label": label, "model": model, "controller": controller,
    }  # fmt: skip
    config = resolve(source, options, overrides or [])
    try:
        with Progress(quiet=quiet) as progress, _stdout_is_stderr():
            from multistep.api import fit_config

            run = fit_config(config, progress, started)
    except Interrupted as stop:
        _interrupted(stop, config.out or "RUN", as_json)
    _show_run(run, as_json)


@app.command()
def resume(
    run_dir: RunArgument,
    budget: Annotated[str | None, typer.Option(help="More than it had: +5m, or a new total: 10m.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go on with a run that was stopped, or give it more time."""
    _check_run(run_dir)
    try:
        with Progress(quiet=quiet) as progress, _stdout_is_stderr():
            from multistep.api import resume as go_on

            run = go_on(run_dir, budget, progress)
    except Interrupted as stop:
        _interrupted(stop, str(run_dir), as_json)
    _show_run(run, as_json)


@app.command()
def explain(run_dir: RunArgument, as_json: JsonOption = False) -> None:
    """Say what was tried, what was decided and why. Works while a run is still going on."""
    from multistep import journal, report

    _check_run(run_dir)
    records = journal.read(run_dir / "journal.jsonl")
    if as_json:
        _print_json(report.summary(records))
    else:
        typer.echo(report.explain(records), nl=False)


@app.command()
def evaluate(
    run_dir: RunArgument,
    source: Annotated[str, typer.Argument(metavar="DATA", help="Labelled data, in any form that fit takes.")],
    as_json: JsonOption = False,
) -> None:
    """Score the model on labelled data: each metric with its standard error."""
    with _stdout_is_stderr():
        found = _load(run_dir).evaluate(source)
    if as_json:
        _print_json(found)
        return
    from multistep.report.explain import scores

    typer.echo(scores(found["metrics"]))
    typer.echo(f"{found['n']} rows")


@app.command()
def predict(
    run_dir: RunArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A text, a file, or - for standard input.")],
    as_json: JsonOption = False,
) -> None:
    """Predict: a line of value, confidence and text, separated by tabs, for each text."""
    _check_bundle(run_dir)
    texts = _texts(text, run_dir)
    with _stdout_is_stderr():
        found = _load(run_dir).predict(texts)
    if as_json:
        rows = [{"text": t, **_plain(p)} for t, p in zip(texts, found, strict=True)]
        _print_json({"predictions": rows})
        return
    lines = ["\t".join((*_answer(p), " ".join(t.split()))) for t, p in zip(texts, found, strict=True)]
    typer.echo("\n".join(lines))


@app.command()
def serve(
    run_dir: RunArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    as_json: JsonOption = False,
) -> None:
    """Serve the model over HTTP: POST /predict {"text": "..."}, GET /health."""
    _check_bundle(run_dir)
    from multistep.serve import serve as serve_bundle

    def announce(address: str, info: Mapping[str, Any]) -> None:
        if as_json:
            _print_json({"address": address, "info": info})
        else:
            typer.echo(f"Serving {run_dir} on {address}: POST /predict, GET /health. Ctrl-C stops.")
        sys.stdout.flush()

    serve_bundle(run_dir, host, port, announce)


@app.command()
def compare(
    optimizers: Annotated[str, typer.Argument(metavar="OPTIMIZERS", help="adamw,muon,sgd,newton_cg@512,lbfgs@all ...")],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Data or a .yaml file, as fit takes them.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as model=lstm batch_size=64.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Of each run: 30s, 10m, '5000 updates' or '2e6 tokens'.")] = "5m",
    seeds: Annotated[int, typer.Option(help="Runs of each optimizer, from seeds 0, 1 ...")] = 3,
    more: Annotated[int, typer.Option(help="Then so many more of the closest ones.")] = 0,
    closest: Annotated[int, typer.Option(help="How many those are.")] = 3,
    probes: Annotated[int, typer.Option(help="Short runs that tune each optimizer, a quarter of the budget each.")] = 3,
    metric: Annotated[str | None, typer.Option(help="What decides: accuracy, f1_macro, log_loss ...")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Rows and plot; kept ones are not run again.  [default: runs/compare]")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare optimizers: tuned alike, trained from several seeds, judged after decay."""
    folder = out or Path("runs") / "compare"
    try:
        with _stdout_is_stderr():
            from multistep.comparison.front import compare as carry_out

            found = carry_out(
                optimizers, source, overrides=overrides or [], metric=metric, budget=budget, seeds=seeds, more=more,
                closest=closest, probes=probes, out=folder, quiet=quiet,
            )  # fmt: skip
    except Interrupted as stop:
        typer.echo(f"rows are kept in {folder}; the same command goes on", err=True)
        if as_json:
            _print_json({"interrupted": signal.Signals(stop.signal).name, "out": str(folder)})
        raise typer.Exit(128 + stop.signal) from None
    if as_json:
        _print_json({**found.summary(), "out": str(folder)})
    else:
        typer.echo(f"{found.table()}\n\nRows, table and curves: {folder}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has: cores, bf16, GPU, memory, optional parts, and whether the model hub answers."""
    with _stdout_is_stderr():
        from multistep import doctor as machine

        facts = machine.examine()
    if as_json:
        _print_json(facts)
    else:
        typer.echo(machine.table(facts))


# ---------------------------------------------------------------------------------------------- the border


def main() -> None:
    """The console command."""
    sys.exit(run())


@app.command("list")
def list_members(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="models, optimizers, objectives, schedules, metrics ...")],
    as_json: JsonOption = False,
) -> None:
    """List what there is to choose from, with what each is for."""
    from multistep.catalog import rows_of

    rows = rows_of(kind)
    if as_json:
        _print_json({kind: rows})
        return
    from multistep.report.words import table

    typer.echo(table(list(rows[0]), [list(row.values()) for row in rows]))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration file: for editors that complete and check keys."""
    from multistep.catalog import config_schema

    _print_json(config_schema())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. What a user can mend becomes one line on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    as_json = "--json" in words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no '±' is no reason to fail
    try:
        code = app(words, prog_name="multistep", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        return _failed(str(error), as_json)
    except TyperException as error:  # an unknown verb or option, a value of the wrong type
        return _failed(error.format_message(), as_json)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Interrupted as stop:
        return 128 + stop.signal
    except OSError as error:
        if error.errno not in _USERS_OS_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        mend = " Free some space and resume." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return _failed(f"{where}{(error.strerror or str(error)).lower()}.{mend}", as_json)


def _failed(message: str, as_json: bool) -> int:
    line = " ".join(message.split())
    typer.echo(f"error: {line}", err=True)
    if as_json:
        _print_json({"error": line})
    return 2


def _interrupted(stop: Interrupted, out: str, as_json: bool) -> NoReturn:
    """Say how to go on, and leave with the signal's exit code."""
    typer.echo(f"saved; resume with `multistep resume {out}`", err=True)
    if as_json:
        _print_json({"interrupted": signal.Signals(stop.signal).name, "out": out})
    raise typer.Exit(128 + stop.signal)


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """Libraries that print notes while they work print them to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


# ---------------------------------------------------------------------------------------------- runs and texts


def _check_run(run_dir: Path) -> None:
    """Before torch is imported: a folder with a journal. Raises UserError."""
    _check_folder(run_dir)
    if not (run_dir / "journal.jsonl").is_file():
        raise UserError(f"{run_dir}: no journal.jsonl there, so it is not a run. Give the folder named by fit --out.")


def _check_bundle(run_dir: Path) -> None:
    """Before torch is imported: a run with a model, or a model's own folder. Raises UserError."""
    _check_folder(run_dir)
    if (run_dir / "multistep.json").is_file() or (run_dir / "model" / "multistep.json").is_file():
        return
    _check_run(run_dir)
    raise UserError(f"{run_dir}: the run has no model yet. Go on with it: multistep resume {run_dir}.")


def _check_folder(run_dir: Path) -> None:
    if not os.path.lexists(run_dir):
        raise UserError(f"{run_dir}: no such folder. Give the folder named by fit --out.")
    if not os.path.isdir(run_dir):
        raise UserError(f"{run_dir}: not a folder. Give the folder named by fit --out.")


def _load(run_dir: Path) -> Run:
    _check_bundle(run_dir)
    from multistep.api import load

    return load(run_dir)


def _texts(argument: str, run_dir: Path) -> list[str]:
    """The texts to predict: standard input, a file's, or the argument itself. Raises UserError."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise UserError("the text: not UTF-8. Set the terminal to UTF-8.") from None
    from multistep.data import Columns, read_texts

    model = run_dir / "model" / "multistep.json"
    info = json.loads((model if model.is_file() else run_dir / "multistep.json").read_text(encoding="utf-8"))
    columns = Columns.parse(info["columns"], "columns") if info.get("columns") else None
    return read_texts(argument, columns)


# ---------------------------------------------------------------------------------------------- output


def _show_run(run: Run, as_json: bool) -> None:
    if as_json:
        _print_json({**run.summary(), "out": str(run.out)})
        return
    from multistep.report.explain import headline

    typer.echo(headline(run.summary()))
    typer.echo(f'Try: multistep predict {run.out} "a text"  ·  multistep explain {run.out}')


def _answer(p: Prediction) -> tuple[str, str]:
    if isinstance(p.value, tuple):
        value = ",".join(p.value)
    else:
        value = f"{p.value:.6g}" if isinstance(p.value, float) else str(p.value)
    return value, "" if p.confidence is None else f"{p.confidence:.4f}"


def _print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    """Anything that a result may hold, as JSON has it. Not-a-number becomes null."""
    if isinstance(value, MetricValue):
        return {"value": _plain(value.value), "stderr": _plain(value.stderr)}
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Prediction):
        return {"value": _plain(value.value), "confidence": _plain(value.confidence), "scores": _plain(value.scores)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value) if isinstance(value, Path) else _plain(value.tolist())  # numpy
