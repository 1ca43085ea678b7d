"""multistep tune for labels: a run is measured, better or cheaper ways are taken, what is served obeys; stopped runs go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import LABELS, config, run, tiny_encoder, write_rows

from multistep import api, journal
from multistep.budget import parse_budget
from multistep.cli import run as command
from multistep.controllers import answering as script
from multistep.data import Columns, load, read_labelled
from multistep.engines import Runtime
from multistep.policy import Policy
from multistep.predictors import Conformal, Predictor, Single, Temperature
from multistep.report.progress import Progress
from multistep.tune import answering as works
from multistep.tuning import labels, tune_run
from multistep.types import UserError, Verdict


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a linear model and a tiny encoder. Copy it before you change it."""
    place = tmp_path_factory.mktemp("run")
    rows = write_rows(place / "rows.csv", rows=900)
    return run(config(rows, place / "run", tiny_encoder(place / "encoder"))).out


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows enough to decide on; a run of 900 keeps 45."""
    return str(write_rows(tmp_path_factory.mktemp("data") / "judged.csv", rows=600, seed=5, noise=0.2))


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making graphs for other engines takes seconds: one test does."""
    monkeypatch.setattr(labels.RunModels, "runtimes", lambda self: [])


@pytest.fixture
def cascades(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny encoder is hardly dearer than the linear model: cascades are tried nevertheless."""
    monkeypatch.setattr(script, "WORTH", 0.0)


def info(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "model" / "multistep.json").read_text(encoding="utf-8"))


TEXTS = (
    [f"river up stone {i}" for i in range(6)] + [f"down paper {i}" for i in range(6)] + ["", "left", "fire left cloud"]
)


def test_a_run_is_tuned_and_served_as_it_was_judged(run_dir: Path, judged: str, cascades: None) -> None:
    before = (run_dir / "model" / "README.md").read_text(encoding="utf-8")
    policy = tune_run(run_dir, budget="60s", data=judged)
    names = [e.name for e in policy.entries]
    assert names[0] == "as it stands" == policy.default and policy.pick in names
    assert any(e.facts.get("recipe", {}).get("first") == "linear" for e in policy.entries), "no cascade was tried"
    alone = {tuple(e.facts["recipe"]["models"]) for e in policy.entries if e.facts["recipe"]["first"] is None}
    assert {("linear",), ("encoder",)} <= alone
    assert set(policy.front) <= set(names) and policy.rows == 600
    assert Policy.parse(info(run_dir)["policy"]) == policy
    bundle = api.load(run_dir).labels
    assert bundle.predictor.model_dump(mode="json") == policy.entry(policy.pick).predictor
    together = bundle.predict(TEXTS)
    for one, text in zip(together, TEXTS, strict=True):
        alone = bundle.predict([text])[0]
        assert (alone.value, alone.stage) == (one.value, one.stage)
        assert alone.scores == pytest.approx(dict(one.scores), abs=1e-4)
        assert one.value in LABELS and one.stage
    after = (run_dir / "model" / "README.md").read_text(encoding="utf-8")
    assert after.startswith(before.rstrip()) and "## How it predicts" in after
    said = api.load(run_dir).explain()
    assert "How it predicts" in said and "why taken or not" in said


def test_a_refitted_model_is_served_and_the_one_that_was_judged_is_compared(tmp_path: Path, judged: str) -> None:
    """But a promise is about the scores that it was made on."""
    rows = write_rows(tmp_path / "rows.csv", rows=900, seed=5, noise=0.3)
    run_dir = run(config(rows, tmp_path / "run", "none")).out
    refit = info(run_dir)["states"]["linear"]
    assert refit.endswith("refit")
    tune_run(run_dir, budget="5s", data=judged)
    started = journal.read(run_dir / "tuning.jsonl")[0]
    assert info(run_dir)["states"] == {"linear": refit} and not started["states"]["linear"].endswith("refit")
    tune_run(run_dir, budget="5s", data=judged, coverage=0.9)
    assert info(run_dir)["states"] == started["states"]


def test_an_engine_is_taken_where_it_agrees(run_dir: Path, judged: str) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = Runtime(runtime="onnx").model_dump(mode="json")
    bundle = replace(api.load(run_dir).labels, predictor=Single(model="encoder"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels.RunModels, "runtimes", lambda self: [("onnx-fp32", onnx)])
        patch.setattr(script, "FASTER", 100.0)
        patch.setattr(works, "admit", lambda *arguments: Verdict(accept=True, rule="told so"))
        quiet = Progress(quiet=True)
        policy = labels.tune_labels(run_dir, bundle, None, None, parse_budget("40s"), judged, None, None, quiet)
    first = policy.entries[1]
    assert first.name == "encoder on onnx-fp32" and first.engine == onnx
    assert first.metrics["accuracy"] == pytest.approx(policy.entries[0].metrics["accuracy"], abs=0.01)
    folder, picked = run_dir / "model", policy.entry(policy.pick)
    assert (
        (info(run_dir).get("engine") == {"encoder": onnx})
        == bool(picked.engine)
        == (folder / "engines" / "onnx-fp32").is_dir()
    )
    assert api.load(run_dir).predict(TEXTS)


def test_what_is_tuned_again_starts_from_what_stands(run_dir: Path) -> None:
    first = tune_run(run_dir, budget="10s")
    second = tune_run(run_dir, budget="10s", metric="f1_macro")
    assert second.metric == "f1_macro" and second.entries[0].predictor == first.entry(first.pick).predictor
    assert second.entries[0].engine == first.entry(first.pick).engine
    kept = journal.read(run_dir / "tuning-1.jsonl")
    assert kept[-1]["kind"] == "Finished" and kept[-1]["pick"] == first.pick
    assert (run_dir / "model" / "README.md").read_text(encoding="utf-8").count("## How it predicts") == 1


def test_the_test_split_is_not_read(run_dir: Path) -> None:
    before = sum(r["kind"] == "TestRead" for r in journal.read(run_dir / "journal.jsonl"))
    tune_run(run_dir, budget="5s")
    assert sum(r["kind"] == "TestRead" for r in journal.read(run_dir / "journal.jsonl")) == before
    assert all(r["kind"] != "TestRead" for r in journal.read(run_dir / "tuning.jsonl"))


def test_a_limit_that_nothing_keeps_leaves_what_stands(run_dir: Path) -> None:
    before = info(run_dir)["predictor"]
    policy = tune_run(run_dir, budget="5s", latency="p50=0.000001ms")
    assert policy.pick == policy.default and info(run_dir)["predictor"] == before
    assert all("too slow" in e.rule for e in policy.entries[1:])
    from multistep.report.policy import explain_policy

    assert "does not keep the limit" in explain_policy(policy.model_dump(mode="json"))


def test_costs_decide(run_dir: Path, judged: str, tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"north": {"south": 30.0, "west": 30.0}}))
    policy = tune_run(run_dir, budget="10s", costs=costs, data=judged)
    taken = policy.entry(policy.pick)
    assert policy.metric == "cost" and taken.facts["recipe"]["decision"] == "costs", policy.rule
    assert taken.metrics["cost"].value < policy.entries[0].metrics["cost"].value
    likeliest = policy.entries[0]
    assert taken.metrics["accuracy"].value <= likeliest.metrics["accuracy"].value
    bundle = api.load(run_dir).labels
    unsure = [p for p in bundle.predict([f"stone river {i}" for i in range(40)]) if p.confidence is not None]
    assert all(p.value == "north" for p in unsure if p.scores["north"] > 0.1)


def test_a_promise_rests_on_rows_of_its_own(run_dir: Path, judged: str) -> None:
    policy = tune_run(run_dir, budget="10s", coverage=0.9, data=judged)
    taken = policy.entry(policy.pick)
    assert taken.predictor["kind"] == "conformal" and taken.predictor["coverage"] == 0.9
    whole = tune_run(run_dir, budget="5s", data=judged)
    assert taken.predictor["rows"] + policy.rows == whole.rows
    assert whole.entries[0].predictor["kind"] == "conformal"  # what stands is what was promised


def test_answers_are_withheld_in_what_is_served_and_printed(
    run_dir: Path, judged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune_run(run_dir, budget="5s", coverage=0.97, data=judged)
    found = api.load(run_dir).predict(TEXTS)
    assert all(p.candidates is not None for p in found)
    assert any(p.abstains for p in found) and any(not p.abstains for p in found)
    (tmp_path / "new.txt").write_text("\n".join(TEXTS))
    assert command(["predict", str(run_dir), str(tmp_path / "new.txt")]) == 0
    said = capsys.readouterr()
    first = [line.split("\t")[0] for line in said.out.splitlines()]
    assert first == ["?" + "|".join(p.candidates or ()) if p.abstains else p.value for p in found]
    assert f"{sum(p.abstains for p in found)} of {len(found)} answers are withheld" in said.err
    assert command(["predict", str(run_dir), str(tmp_path / "new.txt"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    assert [(tuple(r["candidates"]), r["abstains"]) for r in rows] == [(p.candidates, p.abstains) for p in found]


def test_other_rows_may_judge(run_dir: Path, tmp_path: Path) -> None:
    policy = tune_run(run_dir, budget="5s", data=str(write_rows(tmp_path / "other.csv", rows=200, seed=9)))
    assert policy.rows == 200 and policy.data == "other.csv, neither train nor test"
    source = json.loads((run_dir / "journal.jsonl").read_text().splitlines()[0])["config"]["data"]
    with pytest.raises(UserError, match="neither train nor test"):
        tune_run(run_dir, budget="5s", data=str(_train_of(Path(source), tmp_path / "train.csv", run_dir)))


def _train_of(source: Path, out: Path, run_dir: Path) -> Path:
    """The rows of train and test alone."""
    from multistep.data import load

    seed = json.loads((run_dir / "journal.jsonl").read_text().splitlines()[0])["config"]["seed"]
    data = load(str(source), seed=seed)
    rows = "".join(f'"{e.text}",{e.label}\n' for e in (*data.train, *data.test))
    out.write_text("text,label\n" + rows, encoding="utf-8")
    return out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--latency", "20ms"], "p95=20ms"),
        (["--budget", "5 updates"], "is no time"),
        (["--metric", "acuracy"], "Did you mean 'accuracy'"),
        (["--coverage", "1.5"], "is no probability"),
        (["--coverage", "0.9999"], "Give more data or promise less"),
        (["--costs", "nothing.json"], "no such file"),
        (["--data", "nothing.csv"], "nothing.csv"),
    ],
)
def test_what_a_user_can_mend_is_said_in_a_line(
    run_dir: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = info(run_dir)
    assert command(["tune", str(run_dir), "--budget", "4s", *arguments, "--quiet"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last
    assert info(run_dir)["predictor"] == before["predictor"] or "coverage" in said or "promise" in said


def test_a_folder_without_a_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    assert command(["tune", str(tmp_path / "none")]) == 2
    with pytest.raises(UserError, match="a bundle alone"):
        tune_run(run_dir / "model", budget="4s")


def test_the_command_prints_the_policy(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["tune", str(run_dir), "--budget", "4s", "--json", "--quiet"]) == 0
    assert Policy.parse(json.loads(capsys.readouterr().out)).entries


def test_a_stopped_tuning_goes_on(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, real = [0], works.prepare

    def interrupting(*arguments: Any) -> Any:
        tried[0] += 1
        if tried[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(works, "prepare", interrupting)
    assert command(["tune", str(run_dir), "--budget", "20s", "--quiet"]) == 128 + signal.SIGTERM
    past = journal.read(run_dir / "tuning.jsonl")
    assert past[-1]["kind"] == "Interrupted" and api.load(run_dir).predict(["up"])
    monkeypatch.setattr(works, "prepare", real)
    policy = tune_run(run_dir, budget="20s")
    whole = journal.read(run_dir / "tuning.jsonl")
    assert [r["n"] for r in whole[: len(past)]] == [r["n"] for r in past]
    asked = [r["trial"]["id"] for r in whole if r["kind"] == "Asked"]
    assert len(asked) == len(set(asked)) and whole[-1]["kind"] == "Finished"
    assert len(policy.entries) >= len([r for r in past if r["kind"] == "Told"])


@pytest.mark.parametrize("controller", ["halving", "bayes", "reactive", "population"])
def test_a_finished_run_is_tuned_by_any_controller_and_replays(run_dir: Path, judged: str, controller: str) -> None:
    policy = tune_run(run_dir, budget="6s", data=judged, controller=controller)
    asked = [r["trial"] for r in journal.read(run_dir / "tuning.jsonl") if r["kind"] == "Asked"]
    tried = [t for t in asked if t["action"]["kind"] == "try_recipe"]
    assert tried and {t["stage"] for t in tried} == {controller}
    if controller == "halving":  # a part of the rows decides who is looked at again, and nothing else
        assert tried[0]["action"]["share"] == 0.25 and len(policy.entries) <= 1 + sum(
            t["action"]["share"] == 1 for t in tried
        )
    assert api.load(run_dir).predict(["up"]) and all(r.ok for r in api.Run(run_dir).replay())


def tuned(run_dir: Path, predictor: Predictor, data: str | None = None, coverage: float | None = None) -> Policy:
    """As if the predictor stood; nothing else is tried."""
    bundle, budget = replace(api.load(run_dir).labels, predictor=predictor), parse_budget("5s")
    quiet = Progress(quiet=True)
    return labels.tune_labels(run_dir, bundle, None, None, budget, data, None, coverage, quiet, controller="fixed")


WILD = Temperature(inner=Single(model="linear"), temperature=0.05)


def test_what_stands_is_judged_out_of_fold_on_the_runs_own_rows_alone(run_dir: Path, judged: str) -> None:
    own, other = tuned(run_dir, WILD).entries[0], tuned(run_dir, WILD, judged).entries[0]
    assert own.facts["out_of_fold"] and not other.facts["out_of_fold"]
    assert own.predictor == other.predictor == WILD.model_dump(mode="json")
    bundle = replace(api.load(run_dir).labels, predictor=WILD)
    rows = read_labelled(judged, Columns.parse(bundle.info["columns"]), "classify")
    mistakes = sum(p.value != e.label for p, e in zip(bundle.predict([e.text for e in rows]), rows, strict=True))
    assert other.metrics["accuracy"].value == pytest.approx(1 - mistakes / len(rows))
    assert other.metrics["log_loss"].value > 2 * own.metrics["log_loss"].value, (
        "far too sure, but for rows that it was fitted to"
    )
    assert all(replayed.ok for replayed in api.Run(run_dir).replay())


def test_a_promise_on_the_runs_own_rows_is_made_of_the_others(run_dir: Path) -> None:
    policy = tuned(run_dir, WILD, coverage=0.8)
    taken = policy.entry(policy.pick)
    served = api.load(run_dir).labels.predictor
    assert isinstance(served, Conformal) and served.model_dump(mode="json") == taken.predictor
    assert isinstance(served.inner, Temperature) and served.inner.temperature > 0.2 and "fitted again" in policy.rule
    assert policy.entries[0].predictor == WILD.model_dump(mode="json") and policy.rows + served.rows == 45
    assert taken.facts["fitted"] == {"for": "accuracy", "to": labels.OWN}
    assert all(replayed.ok for replayed in api.Run(run_dir).replay())


def test_no_promise_where_too_few_rows_are_left_to_fit_what_stands_again(run_dir: Path, tmp_path: Path) -> None:
    source = json.loads((run_dir / "journal.jsonl").read_text().splitlines()[0])["config"]
    rows = "".join(f'"{e.text}",{e.label}\n' for e in load(source["data"], seed=source["seed"]).calibration[:24])
    (tmp_path / "few.csv").write_text("text,label\n" + rows, encoding="utf-8")
    with pytest.raises(UserError, match=r"coverage: 16 rows are left .* \(< 21\)"):
        tuned(run_dir, WILD, str(tmp_path / "few.csv"), coverage=0.8)
    plain = tuned(run_dir, Single(model="linear"), str(tmp_path / "few.csv"), coverage=0.8)  # has no numbers of its own
    assert plain.entry(plain.pick).predictor["kind"] == "conformal" and plain.entries[0].predictor["kind"] == "single"


def test_what_made_the_predictor_that_stands_is_known(run_dir: Path) -> None:
    dataset = load(json.loads((run_dir / "journal.jsonl").read_text().splitlines()[0])["config"]["data"], seed=0)
    own, new = dataset.calibration[0].text.upper(), "quite another text"
    by_fit = labels._fitted({"metric": "f1_macro"})
    assert by_fit == {"for": "f1_macro", "to": labels.OWN}
    entries = [
        {"name": "as it stands", "facts": {"fitted": by_fit}},
        {"name": "x", "facts": {"fitted": {"for": "mcc", "to": "a.csv"}}},
    ]
    for pick, expected in (("as it stands", by_fit), ("x", {"for": "mcc", "to": "a.csv"})):
        assert labels._fitted({"metric": "accuracy", "policy": {"pick": pick, "entries": entries}}) == expected
    assert labels._before(by_fit, dataset, None, [new]).seen, "the run's own rows"
    assert labels._before(by_fit, dataset, "b.csv", [new, own]).seen, "some of them are the run's own"
    assert not labels._before(by_fit, dataset, "b.csv", [new]).seen
    assert labels._before({"for": "mcc", "to": "a.csv"}, dataset, "b.csv", [new]).seen, (
        "nothing is known of those of a.csv"
    )


def test_texts_of_train_are_left_out_however_they_are_written(run_dir: Path, tmp_path: Path) -> None:
    source = json.loads((run_dir / "journal.jsonl").read_text().splitlines()[0])["config"]
    data, path = load(source["data"], seed=source["seed"]), write_rows(tmp_path / "more.csv", rows=30, seed=9)
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(f'"{e.text.upper()}  ",{e.label}\n' for e in (*data.train[:7], *data.test[:2])))
    policy = tuned(run_dir, Single(model="linear"), str(path))
    assert policy.rows == 30 and policy.data.endswith("; 9 rows that are there too were left out")
