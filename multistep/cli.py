"""The command line: one verb a function, at most 12 options each. Torch is imported inside the verbs that need it.

What verbs share (options, checks, output, how errors end them) is in terminal.py.
"""

from __future__ import annotations

import errno
import io
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from multistep.report.progress import Progress
from multistep.terminal import (
    JsonOption,
    QuietOption,
    RunArgument,
    answer,
    check_bundle,
    check_run,
    failed,
    interrupted,
    is_language,
    lines_in,
    load,
    plain,
    print_json,
    show_run,
    stdout_is_stderr,
    texts_of,
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
    controller: Annotated[str | None, typer.Option(help="staged, race or fixed.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a model from labelled texts within a budget."""
    started = time.monotonic()
    from multistep.config import resolve

    options = {
        "task": task, "metric": metric, "budget": budget, "seed": seed, "out": out,
        "text": tuple(text) if text else None, "label": label, "model": model, "controller": controller, "adapter": adapter,
    }  # fmt: skip
    config = resolve(source, options, overrides or [])
    try:
        with Progress(quiet=quiet) as progress, stdout_is_stderr():
            from multistep.api import fit_config

            run = fit_config(config, progress, started)
    except Interrupted as stop:
        interrupted(stop, config.out or "RUN", as_json)
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
        with Progress(quiet=quiet) as progress, stdout_is_stderr():
            from multistep.api import resume as go_on

            run = go_on(run_dir, budget, progress)
    except Interrupted as stop:
        interrupted(stop, str(run_dir), as_json)
    show_run(run, as_json)


@app.command()
def explain(run_dir: RunArgument, as_json: JsonOption = False) -> None:
    """Say what was tried, what was decided and why. Works while a run is still going on."""
    from multistep import journal, report

    check_run(run_dir)
    records = journal.read(run_dir / "journal.jsonl")
    if as_json:
        print_json(report.summary(records))
    else:
        typer.echo(report.explain(records), nl=False)


@app.command()
def evaluate(
    run_dir: RunArgument,
    source: Annotated[str, typer.Argument(metavar="DATA", help="Labelled data, in any form that fit takes.")],
    as_json: JsonOption = False,
) -> None:
    """Score the model on labelled data: each metric with its standard error."""
    with stdout_is_stderr():
        found = load(run_dir).evaluate(source)
    if as_json:
        print_json(found)
        return
    from multistep.report.explain import scores

    typer.echo(scores(found["metrics"]))
    typer.echo(f"{found['n']} rows")
    for what, cut in found.get("cut", {}).items():
        typer.echo(f"{cut['rows']} {what} were cut, by {cut['tokens']} tokens in all")


@app.command()
def predict(
    run_dir: RunArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A text, a file, or - for standard input.")],
    as_json: JsonOption = False,
) -> None:
    """Predict: a line of value, confidence and text, separated by tabs, for each text; of a model that writes, its answers."""
    check_bundle(run_dir)
    if is_language(run_dir):
        return _write(run_dir, text, as_json)
    texts = texts_of(text, run_dir)
    with stdout_is_stderr():
        found = load(run_dir).predict(texts)
    if as_json:
        rows = [{"text": t, **plain(p)} for t, p in zip(texts, found, strict=True)]
        return print_json({"predictions": rows})
    lines = ["\t".join((*answer(p), " ".join(t.split()))) for t, p in zip(texts, found, strict=True)]
    return typer.echo("\n".join(lines))


def _write(run_dir: Path, source: str, as_json: bool) -> None:
    with stdout_is_stderr():
        bundle = load(run_dir).language
        records = bundle.read(source)
        found = bundle.answer(records)
    for what, cut in bundle.cut().items():
        typer.echo(f"note: {cut['rows']} {what} were too long and cut, by {cut['tokens']} tokens in all", err=True)
    if as_json:
        return print_json(
            {"predictions": [{"text": r.source, **plain(p)} for r, p in zip(records, found, strict=True)]}
        )
    if len(found) == 1:
        return typer.echo(found[0].value)
    return typer.echo("\n".join(" ".join(str(p.value).split()) for p in found))  # an answer a line


@app.command()
def chat(
    run_dir: RunArgument,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=100, help="0: the likeliest tokens.  [default: as tuned]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws, where the temperature is above 0.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model that was fitted with --task chat: a turn a line, answers as they are written; an empty line starts anew."""
    check_bundle(run_dir)
    from multistep.talk import Talk

    with stdout_is_stderr():
        talk = Talk(load(run_dir).language, system, temperature, seed)
    asking = sys.stdin.isatty() and not as_json
    if asking:
        typer.echo("An empty line starts anew, Ctrl-D ends.", err=True)
    for line in lines_in(asking):
        if not line.strip():
            talk.anew()
            continue
        for piece in talk.say(line):
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if not as_json:
            typer.echo()
    if as_json:
        print_json(
            {"conversations": [[{"role": t.role, "text": t.text} for t in turns] for turns in talk.conversations]}
        )


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
    check_bundle(run_dir)
    from multistep.serve import serve as serve_bundle

    def announce(address: str, info: Mapping[str, Any]) -> None:
        if as_json:
            print_json({"address": address, "info": info})
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
    except OSError as error:
        if error.errno not in _USERS_OS_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        mend = " Free some space and resume." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return failed(f"{where}{(error.strerror or str(error)).lower()}.{mend}", as_json)
