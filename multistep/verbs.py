"""The verbs for a model that is there: evaluate, predict, chat, tune, export, serve. `cli.py` puts them on the command line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from multistep.report.progress import Progress
from multistep.terminal import (
    JsonOption,
    QuietOption,
    RunArgument,
    answer,
    check_bundle,
    check_run,
    is_language,
    lines_in,
    load,
    plain,
    print_json,
    stdout_is_stderr,
    texts_of,
)
from multistep.types import Interrupted


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
    if withheld := sum(p.abstains for p in found):
        note = f"note: {withheld} of {len(found)} answers are withheld: ? and the labels that may be right"
        typer.echo(note, err=True)
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


def chat(
    run_dir: RunArgument,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=100, help="0: the likeliest tokens.  [default: as tuned]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="Of the draws, where it draws.  [default: as tuned]")
    ] = None,
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


def tune(
    run_dir: RunArgument,
    metric: Annotated[str | None, typer.Option(help="What decides.  [default: that of the run]")] = None,
    latency: Annotated[str | None, typer.Option(help="What a request may take: p95=20ms, mean=5ms, p99=1s.")] = None,
    budget: Annotated[str, typer.Option(help="How long to search: 30s, 2m.")] = "1m",
    data: Annotated[
        str | None, typer.Option(help="Rows to judge on.  [default: the run's own calibration half]")
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help='What mistakes cost: JSON {"right label": {"label said": cost}}.')
    ] = None,
    coverage: Annotated[
        float | None, typer.Option(help="Withhold answers: the right label is a candidate this often, such as 0.95.")
    ] = None,
    controller: Annotated[
        str, typer.Option(help="staged, fixed, race, reactive, halving, population, bayes, random.")
    ] = "staged",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the best way to predict with a finished run, under a limit on latency, and predict so from now on."""
    check_run(run_dir)
    check_bundle(run_dir)
    try:
        with Progress(quiet=quiet) as progress, stdout_is_stderr():
            from multistep.tuning import tune_run

            policy = tune_run(
                run_dir, metric=metric, latency=latency, budget=budget, data=data, costs=costs, coverage=coverage,
                controller=controller, progress=progress,
            )  # fmt: skip
    except Interrupted as stop:
        typer.echo("saved; the same command goes on", err=True)
        if as_json:
            print_json({"interrupted": signal.Signals(stop.signal).name, "out": str(run_dir)})
        raise typer.Exit(128 + stop.signal) from None
    if as_json:
        return print_json(policy.model_dump(mode="json"))
    from multistep.report.policy import explain_policy

    return typer.echo(explain_policy(policy.model_dump(mode="json")))


def export(
    run_dir: RunArgument,
    to: Annotated[str, typer.Option(help="folder (transformers), onnx, ctranslate2 or keras.")],
    out: Annotated[Path, typer.Option(help="A new folder for it.")],
    as_json: JsonOption = False,
) -> None:
    """Write the model for other programs, measured against itself before it is done."""
    check_bundle(run_dir)
    with stdout_is_stderr():
        from multistep.export import export as write

        found = write(run_dir, to, out)
    if as_json:
        return print_json(found.model_dump(mode="json"))
    return typer.echo(f"{found.out}: {', '.join(found.files)}\n{found.agreement}. README.md says how to use it.")


def serve(
    run_dir: RunArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the token that clients must send; without it MULTISTEP_TOKEN.  [default: no token]"
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=1, max=100_000, help="Texts that may wait; more get 429.")] = 256,
    time_out: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds a request may take.")] = 30.0,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=100_000, help="Tokens that one answer may have, where texts are written.")
    ] = 1024,
    as_json: JsonOption = False,
) -> None:
    """Serve the model over HTTP: a page to try it, POST /predict, OpenAI's /v1, /metrics, /explain, /health."""
    check_bundle(run_dir)
    from multistep.serve import Settings, token_of
    from multistep.serve import serve as serve_bundle

    token = token_of(token_file)

    def announce(address: str, info: Mapping[str, Any]) -> None:
        if as_json:
            print_json({"address": address, "info": info})
        else:
            typer.echo(
                f"Serving {run_dir} on {address}: a page to try it, POST /predict, /v1, GET /health. Ctrl-C stops."
            )
        sys.stdout.flush()

    settings = Settings(queue=queue, time_out=time_out, max_tokens=max_tokens)
    if not serve_bundle(run_dir, host, port, announce, settings, token):
        typer.echo("stopped before everything was answered", err=True)
        raise typer.Exit(1)
