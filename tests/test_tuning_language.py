"""Tuning how a model writes, end to end: what is better is taken and served, limits are kept, a stopped tuning goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs import run
from test_language import config, corpus, pairs, talks, tiny_llama

from multistep import journal
from multistep.api import load
from multistep.budget import parse_budget
from multistep.controllers import decoding
from multistep.language_bundle import rewrite_decoding
from multistep.policy import Limit, Policy
from multistep.predictors.decoding import Greedy, Sample
from multistep.predictors.few_shot import FewShot
from multistep.predictors.ways import Way, plain, read_way, words
from multistep.report.policy import explain_policy, explain_tuning
from multistep.report.progress import Progress
from multistep.tune.decoding import LanguagePrediction
from multistep.tuning import language as tuning_language
from multistep.tuning import tune_run
from multistep.tuning.language import tune_language
from multistep.types import Interrupted, UserError
from multistep.voting import shown
from multistep.writing import Neural

BUDGET = parse_budget("5m")
WILD = Sample(temperature=30.0, max_new_tokens=12)  # all but random: every other way is better


@pytest.fixture(autouse=True)
def _small(torch_seeded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SEARCHED", 2)
    monkeypatch.setattr(decoding, "WIDTHS", (2, 4))
    monkeypatch.setattr(decoding, "DRAWS", 4)


@pytest.fixture(scope="module")
def translated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from multistep.tune import measuring

    folder = tmp_path_factory.mktemp("translated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "LEAST_TARGETS", 10)
        run(
            config(
                pairs(folder, 420),
                folder / "run",
                "translate",
                budget="250 updates",
                batch_tokens=512,
                width=64,
                metric="chrf",
                device="cpu",  # where the network stands in the end, which on other hardware is a matter of luck
            )
        )
    return folder


@pytest.fixture
def wild(translated: Path, tmp_path: Path) -> Path:
    """The run's folder, its model writing as badly as it can."""
    out = tmp_path / "run"
    shutil.copytree(translated / "run", out)
    speaker: Any = load(out).language.speaker
    rewrite_decoding(out / "model", speaker, WILD, {}, "badly")
    return out


def info(out: Path) -> dict[str, Any]:
    return json.loads((out / "model" / "multistep.json").read_text(encoding="utf-8"))


def tuned(out: Path, **more: Any) -> Policy:
    settings: dict[str, Any] = {"metric": None, "limit": None, "budget": BUDGET, "data": None, **more}
    return tune_language(out, progress=Progress(quiet=True), **settings)


def test_halving_looks_at_a_part_of_the_records_first_and_replays(wild: Path) -> None:
    policy = tuned(wild, controller="halving")
    told = {r["trial"]: r["outcome"] for r in journal.read(wild / "tuning.jsonl") if r["kind"] == "Told"}
    asked = [r["trial"] for r in journal.read(wild / "tuning.jsonl") if r["kind"] == "Asked"]
    looks = [t for t in asked if t["action"].get("share", 1.0) < 1 and t["id"] in told]
    assert looks and not any(told[t["id"]]["verdict"]["accept"] for t in looks)
    assert any("looked" in told[t["id"]]["facts"] for t in looks)
    assert policy.entries and all(r.ok for r in load(wild).replay())


def test_the_better_way_is_taken_written_down_and_served(wild: Path) -> None:
    from transformers import GenerationConfig

    before = {p.name: p.read_bytes() for p in (wild / "model").iterdir() if p.suffix == ".safetensors"}
    policy = tuned(wild)
    assert policy.default == words(WILD) and policy.pick != policy.default and policy.metric == "chrf"
    assert policy.pick in policy.front and len(policy.entries) >= 8
    entry = policy.entry(policy.pick)
    assert entry.metrics["chrf"].value > policy.entry(policy.default).metrics["chrf"].value + 10
    bundle = load(wild).language
    way: Way = read_way(info(wild)["standing"]["decoding"])
    assert words(way) == policy.pick and way.model_dump(mode="json") == entry.predictor
    assert bundle.speaker.decoding == way  # pyright: ignore[reportAttributeAccessIssue]
    assert Policy.parse(info(wild)["policy"]) == policy
    read = GenerationConfig.from_pretrained(wild / "model")
    assert read.do_sample == isinstance(plain(way), Sample) and read.max_new_tokens == 12
    assert before == {p.name: p.read_bytes() for p in (wild / "model").iterdir() if p.suffix == ".safetensors"}
    card = (wild / "model" / "README.md").read_text(encoding="utf-8")
    assert card.count("## How it predicts") == 1 and policy.pick in card and "badly" not in card
    # the numbers are those of the calibration half, as the bundle serves it
    from multistep.data.records import load_language
    from multistep.metrics.texts import measure_texts

    data = load_language(str(_data(wild)), task="translate", seed=0)
    said = [str(p.value) for p in bundle.answer(data.calibration)]
    found = measure_texts(["chrf"], said, [r.targets for r in data.calibration])["chrf"]
    assert policy.rows == len(data.calibration) and found.value == pytest.approx(entry.metrics["chrf"].value)


def _data(out: Path) -> str:
    return journal.read(out / "journal.jsonl")[0]["config"]["data"]


def test_the_journal_tells_it_all_and_a_second_tuning_begins_anew(wild: Path) -> None:
    first = tuned(wild)
    records = journal.read(wild / "tuning.jsonl")
    kinds = [r["kind"] for r in records]
    assert kinds[0] == "Started" and kinds[-1] == "Finished" and "Committed" in kinds and "RolledBack" in kinds
    told = [r for r in records if r["kind"] == "Told"]
    settled = [r for r in records if r["kind"] in ("Committed", "RolledBack")]
    assert len(settled) == len(told) - 1 and all(r["rule"] and r["evidence"] for r in settled)
    said = explain_tuning(records)
    assert "Finished after" in said and "taken" in said and all(t["trial"] in said for t in told)
    second = tuned(wild)
    assert second.default == first.pick and (wild / "tuning-1.jsonl").exists()
    assert journal.read(wild / "tuning-1.jsonl")[0]["default"] == records[0]["default"]


@contextmanager
def stopping(after: int) -> Iterator[Callable[[], int]]:
    calls = [0]

    def stop() -> int:
        calls[0] += 1
        return 15 if calls[0] > after else 0

    yield stop


@pytest.mark.parametrize("after", [3, 150])
def test_a_stopped_tuning_leaves_a_whole_bundle_and_goes_on(
    wild: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tuning_language, "signals", lambda: stopping(after))
        with pytest.raises(Interrupted):
            tuned(wild)
    past = journal.read(wild / "tuning.jsonl")
    assert past[-1]["kind"] == "Interrupted"
    stands = [r["incumbent"]["decoding"] for r in past if r["kind"] == "Committed"]
    assert load(wild).language.predict(["one two"])
    assert info(wild)["standing"]["decoding"] == (stands[-1] if stands else WILD.model_dump(mode="json"))
    policy = tuned(wild)
    records = journal.read(wild / "tuning.jsonl")
    asked = [r["trial"]["id"] for r in records if r["kind"] == "Asked"]
    assert len(set(asked)) == len(asked) and records[: len(past)] == past
    assert [r["kind"] for r in records].count("Resumed") == 1 and records[-1]["kind"] == "Finished"
    assert policy.default == words(WILD) and policy.pick != policy.default


def test_a_killed_tuning_believes_its_journal(wild: Path) -> None:
    """Killed between what came of a trial and its decision, in the middle of a line."""
    tuned(wild, budget=parse_budget("3s"))
    speaker: Any = load(wild).language.speaker
    rewrite_decoding(wild / "model", speaker, WILD, {}, "badly")
    lines = (wild / "tuning.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    told = [n for n, line in enumerate(lines) if json.loads(line)["kind"] == "Told"][1]  # the first candidate: greedy
    entry = json.loads(lines[told])["outcome"]["facts"]["entry"]
    (wild / "tuning.jsonl").write_text("".join(lines[: told + 1]) + lines[told + 1][:30], encoding="utf-8")
    policy = tuned(wild, budget=parse_budget("3s"))
    assert policy.entry("greedy").latency.model_dump() == entry["latency"]  # not measured again
    kinds = [r["kind"] for r in journal.read(wild / "tuning.jsonl")]
    assert kinds.count("Started") == kinds.count("Resumed") == kinds.count("Finished") == 1 and "Committed" in kinds


def test_other_settings_begin_anew_where_a_tuning_was_stopped(wild: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tuning_language, "signals", lambda: stopping(3))
        with pytest.raises(Interrupted):
            tuned(wild)
    policy = tuned(wild, metric="bleu", limit=Limit(ms=1e6), budget=parse_budget("1s"))
    assert policy.metric == "bleu" and (wild / "tuning-1.jsonl").exists()
    assert "Resumed" not in [r["kind"] for r in journal.read(wild / "tuning.jsonl")]


def test_what_is_clearly_too_slow_is_refused_after_a_few_requests(wild: Path) -> None:
    policy = tuned(wild, limit=Limit(ms=1e-3))
    assert [e.name for e in policy.entries] == [policy.default] == [policy.pick]
    tried = [r for r in journal.read(wild / "tuning.jsonl") if r["kind"] == "RolledBack"]
    assert tried and all("of the first 3 requests took" in r["rule"] and "ms" in r["rule"] for r in tried)
    assert {r["name"] for r in policy.refused} >= {"greedy"}
    assert "does not keep the limit" in explain_policy(policy.model_dump(mode="json"))
    assert info(wild)["standing"]["decoding"] == WILD.model_dump(mode="json")


def test_what_breaks_the_limit_is_refused_by_its_latency(wild: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from multistep.policy import Latency

    real = LanguagePrediction._latency

    def slow_beams(self: LanguagePrediction, way: Way, engine: Mapping[str, Any]) -> Latency:
        found = real(self, way, engine)
        return found.with_(p95=9e9) if way.kind == "beam" else found

    monkeypatch.setattr(LanguagePrediction, "_latency", slow_beams)
    policy = tuned(wild, limit=Limit(ms=1e6))
    assert policy.pick != policy.default and not [e for e in policy.entries if e.name.startswith("beam")]
    assert all("p95 9e+09 ms > 1e+06 ms" in r["why"] for r in policy.refused if r["name"].startswith("beam"))
    assert [r for r in policy.refused if r["name"].startswith("beam 2")]


def test_time_that_is_short_is_kept_and_said(wild: Path) -> None:
    policy = tuned(wild, budget=parse_budget("0.5s"))
    assert policy.entries[0].name == policy.default
    assert [r for r in policy.refused if "s are left" in r["why"]]
    text = explain_policy(policy.model_dump(mode="json"))
    assert "not begun" in text and "s are left" in text


def test_a_file_may_judge_but_not_with_rows_of_train_or_test(wild: Path, tmp_path: Path) -> None:
    from multistep.data.records import load_language

    own = load_language(_data(wild), task="translate", seed=0)
    path = tmp_path / "more.jsonl"
    rows = [
        {"source": r.source, "target": r.targets[0]}
        for r in [*own.calibration, *own.control, *own.train[:7], *own.test[:2]]
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    policy = tuned(wild, data=str(path), budget=parse_budget("1s"))
    left = [
        r for r in rows if (r["source"], (r["target"],)) not in {(o.source, o.targets) for o in (*own.train, *own.test)}
    ]
    assert policy.rows == len(left) <= len(rows) - 9
    assert (
        policy.data
        == f"more.jsonl, neither train nor test; {len(rows) - len(left)} rows that are there too were left out"
    )
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[-9:]), encoding="utf-8")
    with pytest.raises(UserError, match="0 records that are neither train nor test"):
        tuned(wild, data=str(path))


def test_a_source_of_train_is_left_out_whatever_its_answer(wild: Path, tmp_path: Path) -> None:
    from multistep.data.records import load_language

    own, path = load_language(_data(wild), task="translate", seed=0), tmp_path / "more.jsonl"
    new = [*own.calibration, *own.control][:30]
    rows = [{"source": r.source, "target": r.targets[0]} for r in new]
    rows += [{"source": r.source.upper(), "target": "another answer"} for r in (*own.train[:5], *own.test[:2])]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    policy = tuned(wild, data=str(path), budget=parse_budget("1s"))
    assert policy.rows == 30 and policy.data.endswith("; 7 rows that are there too were left out")


def test_small_losses_do_not_add_up(wild: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a little worse than what stands is compared with the best that has stood too."""
    from multistep.policy import Latency
    from multistep.tune import decoding as works

    asked: list[tuple[str, str | None]] = []
    real = works.admit

    def admit(better: Any, compared: Any, new: Latency, old: Latency, limit: Any, best: Any, *rest: Any) -> Any:
        asked.append((f"{compared.incumbent:.6f}", best and f"{best.incumbent:.6f}"))
        found = real(better, compared, new, old, limit, best, *rest)
        return found.with_(accept=len(asked) < 3)  # the first two are taken, whatever they are worth

    monkeypatch.setattr(works, "admit", admit)
    policy = tuned(wild)
    values = [f"{e.metrics['chrf'].value:.6f}" for e in policy.entries]
    best = max(values[:3], key=float)
    assert asked[0] == (values[0], None) and len(asked) > 2
    assert all(a == (values[2], None if best == values[2] else best) for a in asked[2:])


def test_data_that_changed_are_refused(translated: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "run", tmp_path / "pairs.jsonl"
    shutil.copytree(translated / "run", out)
    shutil.copy(translated / "pairs.jsonl", data)
    lines = (out / "journal.jsonl").read_text(encoding="utf-8").replace(str(translated / "pairs.jsonl"), str(data))
    (out / "journal.jsonl").write_text(lines, encoding="utf-8")
    with open(data, "a", encoding="utf-8") as file:
        file.write('{"source": "one", "target": "eins"}\n' * 40)
    with pytest.raises(UserError, match="changed since"):
        tuned(out)


def test_bad_asks_are_named(wild: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bits_per_byte"):
        tuned(wild, metric="bits_per_byte")
    with pytest.raises(UserError, match="accuracy"):
        tuned(wild, metric="accuracy")
    with pytest.raises(UserError, match="2m"):
        tune_run(wild, budget="10 updates")
    with pytest.raises(UserError, match="run's folder"):
        tuned(wild / "model")
    with pytest.raises(UserError, match="not a run"):
        tuned(tmp_path)
    run(config(corpus(tmp_path), tmp_path / "lm", "lm", budget="4 updates", model="none"))
    with pytest.raises(UserError, match="losses"):
        tuned(tmp_path / "lm")


def test_a_model_of_prompts_is_shown_examples_that_travel_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    settings = {
        "model": str(tiny_llama(tmp_path / "llama")),
        "width": None,
        "depth": None,
        "tokenizer": "auto",
        "vocabulary": None,
    }
    run(config(talks(tmp_path, 420), out, "chat", budget="20 updates", **settings))
    with pytest.raises(UserError, match="such as chrf"):
        tuned(out)
    speaker: Any = load(out).language.speaker
    rewrite_decoding(out / "model", speaker, Greedy(max_new_tokens=5), {}, "short")
    from multistep.tune import decoding as works
    from multistep.types import Verdict

    real = works.LanguagePrediction._verdict

    def verdict(self: Any, way: Way, *rest: Any) -> Verdict:
        return real(self, way, *rest).with_(accept=way.kind == "few_shot" and way.k == 2)

    monkeypatch.setattr(works.LanguagePrediction, "_verdict", verdict)
    policy = tuned(out, metric="chrf")
    kinds = {e.predictor["kind"] for e in policy.entries}
    assert {"few_shot", "draft_revise", "mbr"} <= kinds
    stands = info(out)
    assert stands["standing"]["decoding"]["kind"] == "few_shot"
    assert "examples" in stands["neural"]["not_in_generation_config"][0]
    assert len((out / "model" / "examples.jsonl").read_text(encoding="utf-8").splitlines()) > 100
    moved = tmp_path / "elsewhere"
    shutil.move(out / "model", moved)
    bundle = load(moved).language
    speaker = bundle.speaker
    assert isinstance(speaker, Neural)
    records = speaker.examples.records[:3]
    served = [p.value for p in bundle.answer(records)]
    assert served == [p.value for r in records for p in bundle.answer([r])]
    assert isinstance(speaker.decoding, FewShot)
    asked = speaker.prompts(shown(speaker, records, speaker.decoding))
    plain = speaker.prompts(records)
    assert all(len(a) > len(b) for a, b in zip(asked, plain, strict=True))
