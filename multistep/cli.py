"""The command line: one verb a function, at most 12 options each beside --quiet and --json. Torch is imported inside the verbs that need it.

What verbs share (options, checks, output, how errors end them) is in terminal.py.
"""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from multistep import verbs
from multistep.launch import assists
from multistep.report.progress import Progress
from multistep.terminal import (
    JsonOption,
    QuietOption,
    RunArgument,
    check_run,
    failed,
    interrupted,
    print_json,
    show_run,
    stdout_is_stderr,
)  # fmt: skip
from multistep.types import Interrupted, UserError

# What a user can mend: a full disk, a folder that may not be written, a name that is a folder.
_USERS_OS_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EISDIR, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.EEXIST,
}  # fmt: skip

app = typer.Typer(
    name="multistep",
    help="A text dataset, a metric and a time budget in; a validated language model and the reasons for it out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def fit(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Data (file, folder, hub name) or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as optimizer.lr=1e-4.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="classify, multilabel, regress (inferred from labels); lm, translate, summarize, answer, chat."
        ),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What decides: accuracy, f1_macro, mse ...")] = None,
    budget: Annotated[
        str | None, typer.Option(help="30s, 10m, 2h, '5000 updates' or '2e6 tokens'.  [default: 5m]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random choice.  [default: 0]")] = None,
    out: Annotated[str | None, typer.Option(help="The run's folder.  [default: runs/<name of the data>]")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text column; may be given several times.")] = None,
    label: Annotated[str | None, typer.Option(help="The label column.")] = None,
    model: Annotated[
        str | None, typer.Option(help="auto, lstm, none, or a pretrained one: a folder or a hub name.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="lora: train an adapter beside a model that writes.")] = None,
    controller: Annotated[
        str | None,
        typer.Option(help="staged, fixed, race, reactive, halving, population, bayes, random.  [default: staged]"),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Stop training at a score such as f1=0.93, reached with its error.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a model from labelled texts within a budget."""
    started = time.monotonic()
    from multistep.config import resolve

    options = {
        "task": task, "metric": metric, "budget": budget, "seed": seed, "out": out,
        "text": tuple(text) if text else None, "label": label, "model": model, "controller": controller, "adapter": adapter,
        "until": until,
    }  # fmt: skip
    config = resolve(source, options, overrides or [])
    try:
        with Progress(quiet=quiet or assists()) as progress, stdout_is_stderr():
            from multistep.api import fit_config

            run = fit_config(config, progress, started)
    except Interrupted as stop:
        interrupted(stop, config.out or "RUN", as_json)
    if not assists():
        show_run(run, as_json)


@app.command()
def resume(
    run_dir: RunArgument,
    budget: Annotated[str | None, typer.Option(help="More than it had: +5m, or a new total: 10m.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go on with a run that was stopped, or give it more time."""
    check_run(run_dir)
    try:
        with Progress(quiet=quiet or assists()) as progress, stdout_is_stderr():
            from multistep.api import resume as go_on

            run = go_on(run_dir, budget, progress)
    except Interrupted as stop:
        interrupted(stop, str(run_dir), as_json)
    if not assists():
        show_run(run, as_json)


@app.command()
def explain(
    run_dir: RunArgument,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as an HTML page that needs no other file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what was tried, what was decided and why. Works while a run is still going on."""
    from multistep import report

    check_run(run_dir)
    if page is not None:
        from multistep.explained import write_page

        write_page(run_dir, page)
    if as_json:
        print_json(report.summary_of_run(run_dir))
    elif page is None:
        typer.echo(report.explain_run(run_dir), nl=False)
    else:
        typer.echo(f"Written: {page}")


@app.command()
def replay(run_dir: RunArgument, as_json: JsonOption = False) -> None:
    """Derive what a run decided and diagnosed again from its journal alone; exit with 1 where something does not follow from its evidence."""
    check_run(run_dir)
    from multistep.replay import check, replay_run

    found = replay_run(run_dir)
    if not any(r.findings for r in found):
        check(found)
    if as_json:
        print_json({"ok": all(r.ok for r in found), "journals": [r.model_dump(mode="json") for r in found]})
    else:
        typer.echo("\n".join(str(line) for r in found for line in (*r.findings, r)))
    if not all(r.ok for r in found):
        raise typer.Exit(1)


for _verb in (verbs.evaluate, verbs.predict, verbs.chat, verbs.tune, verbs.export, verbs.serve):
    app.command()(_verb)


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
        with stdout_is_stderr():
            from multistep.comparison.front import compare as carry_out

            found = carry_out(
                optimizers, source, overrides=overrides or [], metric=metric, budget=budget, seeds=seeds, more=more,
                closest=closest, probes=probes, out=folder, quiet=quiet,
            )  # fmt: skip
    except Interrupted as stop:
        typer.echo(f"rows are kept in {folder}; the same command goes on", err=True)
        if as_json:
            print_json({"interrupted": signal.Signals(stop.signal).name, "out": str(folder)})
        raise typer.Exit(128 + stop.signal) from None
    if as_json:
        print_json({**found.summary(), "out": str(folder)})
    else:
        typer.echo(f"{found.table()}\n\nRows, table and curves: {folder}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has: cores, bf16, GPU, memory, optional parts, and whether the model hub answers."""
    with stdout_is_stderr():
        from multistep import doctor as machine

        facts = machine.examine()
    if as_json:
        print_json(facts)
    else:
        typer.echo(machine.table(facts))


@app.command("list")
def list_members(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="models, optimizers, objectives, schedules, metrics ...")],
    as_json: JsonOption = False,
) -> None:
    """List what there is to choose from, with what each is for."""
    from multistep.catalog import rows_of

    rows = rows_of(kind)
    if as_json:
        print_json({kind: rows})
        return
    from multistep.report.words import table

    typer.echo(table(list(rows[0]), [list(row.values()) for row in rows]))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration file: for editors that complete and check keys."""
    from multistep.catalog import config_schema

    print_json(config_schema())


# ---------------------------------------------------------------------------------------------- the border


def main() -> None:
    """The console command."""
    sys.exit(run())


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
        return failed(str(error), as_json)
    except TyperException as error:  # an unknown verb or option, a value of the wrong type
        return failed(error.format_message(), as_json)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Interrupted as stop:
        return 128 + stop.signal
    except (MemoryError, RuntimeError) as error:
        from multistep.allocation import out_of_memory, shortage

        if not out_of_memory(error):
            raise
        return failed(str(shortage(error)), as_json)
    except Exception as error:
        found = _system_error(error)
        if found is None or found.errno not in _USERS_OS_ERRORS:
            raise
        where = f"{found.filename}: " if found.filename else ""
        mend = " Free some space and resume." if found.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return failed(f"{where}{(found.strerror or str(found)).lower()}.{mend}", as_json)


def _system_error(error: Exception) -> OSError | None:
    """The system's error; also where a library wraps it: safetensors and tokenizers leave its number in their words, numpy none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    short = isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", str(error))
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if short else None
