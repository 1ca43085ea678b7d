"""Runs on tasks whose answer is a text: they end, their bundles serve what was judged, they go on where they were stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run, same_states

from multistep import cli, journal
from multistep.api import load, resume
from multistep.config import FitConfig
from multistep.controllers.sizes import RUNGS
from multistep.language import check_used
from multistep.other_writers import Mixed
from multistep.tasks.writing import Writing
from multistep.tune import measuring
from multistep.types import Interrupted, UserError
from multistep.writing import Neural

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ZAHLEN = ("eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")


def pairs(folder: Path, rows: int = 260) -> Path:
    """Numbers in words, English to German and backwards: a small model learns it, a dictionary does not."""
    rng = random.Random(0)
    path = folder / "pairs.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            digits = [rng.randrange(9) for _ in range(rng.randint(2, 3))]
            row = {
                "source": " ".join(NUMBERS[d] for d in digits),
                "target": " ".join(ZAHLEN[d] for d in reversed(digits)),
            }
            file.write(json.dumps(row) + "\n")
    return path


def corpus(folder: Path) -> Path:
    rng = random.Random(1)
    path = folder / "corpus.txt"
    lines = [f"The {rng.choice(NUMBERS)} of {rng.choice(NUMBERS)} is {rng.choice(NUMBERS)}.\n" for _ in range(600)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def talks(folder: Path, rows: int = 120) -> Path:
    path = folder / "talks.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            turns = [
                {"role": "user", "content": f"Say {NUMBERS[i % 9]}, {i}"},
                {"role": "assistant", "content": f"{ZAHLEN[i % 9]} 好 {i}"},
            ]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return path


def config(data: Path, out: Path, task: str, **more: Any) -> FitConfig:
    settings: dict[str, Any] = {
        "data": str(data), "out": str(out), "task": task, "budget": "48 updates", "width": 32, "depth": 1,
        "batch_tokens": 256, "tokenizer": "bytes", "vocabulary": 300, "optimizer": {"lr": 3e-3}, **more,
    }  # fmt: skip
    return FitConfig.parse(settings)


@pytest.fixture(autouse=True)
def _small(torch_seeded: None, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(measuring, "LEAST_TARGETS", 10)


def standing(out: Path) -> dict[str, Any]:
    return json.loads((out / "model" / "multistep.json").read_text(encoding="utf-8"))["standing"]


def test_a_translation_learns_and_its_folder_writes_the_same_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    out = tmp_path / "run"
    found = run(
        config(pairs(tmp_path, 700), out, "translate", budget="600 updates", batch_tokens=512, width=64, metric="chrf")
    )
    kinds = [r["kind"] for r in found.records()]
    assert kinds.count("TestRead") == 1 and kinds[-1] == "Finished"
    assert standing(out)["kind"] == "model", found.explain()
    bundle = load(out).language
    assert isinstance(bundle.speaker, Neural)
    texts = ["one two three", "nine eight"]
    ours = [p.value for p in bundle.predict(texts)]
    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(out / "model"),
        AutoTokenizer.from_pretrained(out / "model"),
    )
    for text, said in zip(texts, ours, strict=True):
        ids = model.generate(**tokenizer(text, return_tensors="pt"))
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == said
    again = bundle.evaluate(tmp_path / "pairs.jsonl")
    assert again["n"] == 700 and {"chrf", "bleu"} <= again["metrics"].keys()
    assert all(0.0 <= p.confidence <= 1.0 for p in bundle.predict(texts) if p.confidence is not None)


def test_a_language_model_beats_counts_only_where_it_does(tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = run(config(corpus(tmp_path), out, "lm", tokenizer="auto", budget="60 updates"))
    metrics = found.summary()["metrics"]
    assert 0 < metrics["bits_per_byte"]["value"] < 3.0 and metrics["perplexity"]["value"] > 1.0
    trials = [r["trial"]["stage"] for r in found.records() if r["kind"] == "Asked"]
    assert trials[:2] == ["profile", "incumbent"] and "mix" in trials and trials[-1] == "test"
    assert standing(out)["kind"] in ("ngram", "mixed", "model")
    said = load(out).predict(["The one of "])[0].value
    assert said and said == load(out).predict(["The one of "])[0].value


def test_a_mixture_charges_what_it_draws_from(tmp_path: Path) -> None:
    from multistep.codec import Codec
    from multistep.data.cells import Record
    from multistep.models.decoder import new_decoder
    from multistep.models.ngram import NGram
    from multistep.other_writers import Counted
    from multistep.predictors.decoding import Greedy
    from multistep.subwords import train_characters
    from multistep.tasks.writing import Writing
    from multistep.tune.speakers import _tokenizer_config

    text = "Wörter und 字, one by one. " * 20
    train_characters([text], tmp_path / "tokenizer.json")
    _tokenizer_config(tmp_path)
    codec = Codec.load(tmp_path)
    ids = {"pad": codec.pad, "bos": codec.bos, "eos": codec.eos}
    model = new_decoder(len(codec.tokenizer), 32, 1, 64, ids, 0)
    neural = Neural(model, codec, Writing(kind="lm"), "stream", 64, Greedy(max_new_tokens=5))
    counted = Counted(NGram.fit([text]), codec)
    records = [Record("", ("Wörter und 字",)), Record("", (", one by",))]
    for share in (0.3, 1.0):
        mixed = Mixed(neural, counted, share)
        losses = mixed.losses(records, running=True)
        assert losses[:, 2].tolist() == [len("Wörter und 字".encode()), 8]
        if share == 1.0:
            assert losses == pytest.approx(neural.losses(records, running=True))
    # the chances of the characters after a text are those of the two models, mixed
    from multistep.models.mixed import Mixture
    from multistep.models.step import stepper_of

    stepper = stepper_of(Mixture(model, counted.ngram, codec.tokenizer, 0.3))
    prompt = neural.prompts([Record("Wört", ())])
    p_V = stepper.start(prompt)[0].exp()
    nats, _, owner = Mixed(neural, counted, 0.3).parts([Record("", ("Wörte",))], running=True)
    e = codec.tokenizer.convert_tokens_to_ids("e")
    counted_e = counted.ngram.nats_of_bytes(["Wörte"])[-1]
    assert float(p_V[e]) == pytest.approx(0.3 * 2.718281828 ** -nats[-1] + 0.7 * 2.718281828**-counted_e, rel=1e-4)
    assert owner[0] == -1 and mixed.write([Record("Wört", ())])[0].value is not None


def test_a_chat_from_scratch_takes_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    out = tmp_path / "run"
    found = run(config(talks(tmp_path), out, "chat", budget="300 updates", width=64))
    assert found.summary()["metric"] == "bits_per_byte"
    if standing(out)["kind"] != "model":
        pytest.fail(f"the counts won: {found.explain()}")
    monkeypatch.setattr("sys.stdin", io.StringIO("Say one, 1\n\nSay two, 2\n"))
    assert cli.run(["chat", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["conversations"]
    assert [[t["role"] for t in talk] for talk in said] == [["user", "assistant"], ["user", "assistant"]]


def test_a_chat_of_several_turns_is_judged_by_all_of_them(tmp_path: Path) -> None:
    from multistep.models.ngram import NGram
    from multistep.writing import sizes

    path, out = tmp_path / "long.jsonl", tmp_path / "run"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(120):
            said = [f"Say {NUMBERS[i % 9]}, {i}", f"zuerst {ZAHLEN[i % 9]} {i}", "And then?", f"{ZAHLEN[i % 7]} 好 {i}"]
            turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    found = run(config(path, out, "chat", budget="20 updates"))
    told = {r["trial"]: r["outcome"] for r in found.records() if r["kind"] == "Told"}
    assert told["02-incumbent"]["facts"]["standing"]["kind"] == "ngram" and found.summary()["test"] is not None
    assert NGram.load(out / "states" / "02-incumbent").bits_N(["zuerst"])[0] < 8 * len("zuerst") / 2
    bundle = load(out).language
    records = bundle.read(path)
    losses = bundle.speaker.losses(records, False)
    assert losses is not None and losses[:, 2].tolist() == sizes(records).tolist()
    assert all(
        size == len("".join(r.turns[i].text for i in (1, 3)).encode())
        for r, size in zip(records, sizes(records), strict=True)
    )


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    from multistep.tune import segment

    data = pairs(tmp_path)
    straight = run(config(data, tmp_path / "a", "translate", budget="60 updates"))
    calls = {"n": 0}
    whole = segment.run_segment

    def stopping(trial: Any, state: Any, rows: Any, keeper: Any, watch: Any, stop: Any) -> Any:
        def soon() -> int:
            calls["n"] += 1
            return 15 if calls["n"] == 30 else 0

        return whole(trial, state, rows, keeper, watch, soon)

    from multistep.tune import training

    training.run_segment = stopping
    try:
        with pytest.raises(Interrupted):
            run(config(data, tmp_path / "b", "translate", budget="60 updates"))
    finally:
        training.run_segment = whole
    resume(tmp_path / "b")
    same_states(tmp_path / "a", tmp_path / "b")
    ours, other = (r.summary()["metrics"] for r in (straight, load(tmp_path / "b")))
    assert ours == other


def test_a_finished_run_is_given_more_and_goes_on_from_its_trunk(tmp_path: Path) -> None:
    run(config(pairs(tmp_path), tmp_path / "run", "translate"))
    found = resume(tmp_path / "run", "+40 updates")
    asked = [r["trial"] for r in found.records() if r["kind"] == "Asked"]
    again = [t for t in asked if t["id"].startswith("2-")]
    trunk = next(t for t in again if t["stage"] == "trunk")
    assert trunk["start"] == next(t["id"] for t in asked if t["stage"] == "trunk")
    assert [t["stage"] for t in again][-1] == "test"
    assert journal.read(tmp_path / "run" / "journal.jsonl")[-1]["kind"] == "Finished"


def test_it_goes_on_in_its_size_whatever_would_be_chosen_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(measuring, "weights_fit", lambda *_: False)
    run(config(pairs(tmp_path), tmp_path / "run", "translate", width=None, depth=None))
    answers = iter([True, True])
    monkeypatch.setattr(measuring, "weights_fit", lambda *_: next(answers, False))
    found = resume(tmp_path / "run", "+40 updates")
    asked = [r["trial"]["action"] for r in found.records() if r["kind"] == "Asked"]
    shapes = [action["shape"] for action in asked if "shape" in action]
    assert {(s["width"], s["layers"]) for s in shapes} == {RUNGS[0]} and len(shapes) > 2


def test_without_test_none_is_read_and_tuning_goes_on(tmp_path: Path) -> None:
    settings = {"model": str(tiny_llama(tmp_path / "llama")), "width": None, "depth": None, "tokenizer": "auto"}
    settings |= {"vocabulary": None, "test": False}
    found = run(config(talks(tmp_path, 420), tmp_path / "run", "chat", budget="20 updates", **settings))
    assert found.summary()["test"] is None and not [r for r in found.records() if r["kind"] == "TestRead"]
    assert found.tune(budget="1s", metric="chrf").entries


def test_summaries_and_free_answers_have_cheap_writers_first(tmp_path: Path) -> None:
    path = tmp_path / "papers.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(60):
            document = (
                f"We study {NUMBERS[i % 9]} things. They are {NUMBERS[(i + 3) % 9]} and {i}. Nothing else is said here."
            )
            file.write(json.dumps({"document": document, "summary": f"We study {NUMBERS[i % 9]} things."}) + "\n")
    found = run(config(path, tmp_path / "s", "summarize", budget="8 updates", model="none"))
    assert found.summary()["metrics"]["rougeL"]["value"] > 0.9, found.explain()
    assert standing(tmp_path / "s")["kind"] == "writer"
    assert load(tmp_path / "s").predict(["We study six things. So it is."])[0].value == "We study six things."
    assert "--model none" in found.explain()
    card = (tmp_path / "s" / "model" / "README.md").read_text(encoding="utf-8")
    assert "No trained model stands behind it" in card and "summarization" in card


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fit", "DATA", "--task", "translat"], "translate"),
        (["fit", "DATA", "--task", "translate", "--metric", "perplexity"], "perplexity"),
        (["fit", "DATA", "--task", "translate", "--metric", "accuracy"], "accuracy"),
        (["fit", "DATA", "--task", "translate", "--adapter", "lora"], "--model"),
        (["fit", "DATA", "--task", "translate", "--model", "lstm"], "lstm"),
        (["fit", "DATA", "--task", "translate", "--model", "nowhere/at/all"], "nowhere"),
        (["fit", "DATA", "--task", "chat", "widht=32"], "width"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pairs(tmp_path, 40)
    words = [str(data) if a == "DATA" else a for a in arguments]
    assert cli.run([*words, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error:") and named in said[-1]


def test_what_a_model_has_no_use_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dropout: only models from scratch"):
        run(config(corpus(tmp_path), tmp_path / "run", "lm", dropout=0.1))
    assert not (tmp_path / "run").exists()
    given = FitConfig(data="x.csv", task="answer", label_smoothing=0.1)
    check_used(given, Writing(kind="answer", answers="free"), "")
    with pytest.raises(UserError, match="label_smoothing: a span"):
        check_used(given, Writing(kind="answer", answers="passage"), "encoder")


def test_a_bundle_of_labels_does_not_chat(tmp_path: Path) -> None:
    found = run(config(corpus(tmp_path), tmp_path / "run", "lm", budget="4 updates", model="none"))
    with pytest.raises(UserError, match="turns"):
        from multistep.talk import Talk

        Talk(found.language)


def tiny_llama(folder: Path) -> Path:
    """A Llama of one layer with random weights, as a pretrained model would lie in a folder."""
    from multistep.models.decoder import new_decoder
    from multistep.subwords import train_bytes
    from multistep.tune.speakers import _tokenizer_config

    folder.mkdir()
    train_bytes([" ".join(NUMBERS), " ".join(ZAHLEN)] * 3, 300, folder / "tokenizer.json")
    _tokenizer_config(folder)
    new_decoder(300, 32, 1, 256, {"pad": 0, "bos": 1, "eos": 2}, 0).save_pretrained(folder)
    return folder


def test_an_adapter_improves_on_the_model_as_given_and_lies_beside_it(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, out = tiny_llama(tmp_path / "llama"), tmp_path / "run"
    settings = {
        "model": str(base),
        "adapter": "lora",
        "width": None,
        "depth": None,
        "tokenizer": "auto",
        "vocabulary": None,
    }
    found = run(config(talks(tmp_path, 500), out, "chat", budget="60 updates", optimizer={"lr": 1e-2}, **settings))
    trials = {r["trial"]: r["outcome"] for r in found.records() if r["kind"] == "Told"}
    given, trunk = trials["02-incumbent"], trials["03-trunk"]
    assert trunk["metrics"]["bits_per_byte"][0] < given["metrics"]["bits_per_byte"][0]
    assert standing(out)["kind"] == "model" and trunk["verdict"]["accept"]
    whole = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "model" / "adapter").eval()
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, beside(ids).logits, rtol=1e-4, atol=1e-4)


def test_answers_stand_in_their_passages(tmp_path: Path) -> None:
    from runs import WORDS, tiny_encoder

    rng, path, rows = random.Random(2), tmp_path / "squad.jsonl", []
    for i in range(120):
        words = [rng.choice(WORDS) for _ in range(12)]
        place = rng.randrange(1, 10)
        context = " ".join(words)
        start = len(" ".join(words[:place])) + 1
        rows.append({"context": f"{context} {i}", "question": f"what follows {words[place - 1]} {i}",
                     "answers": [words[place]], "answer_starts": [start]})  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    encoder, out = tiny_encoder(tmp_path / "encoder"), tmp_path / "run"
    settings = {"model": str(encoder), "width": None, "depth": None, "tokenizer": "auto", "vocabulary": None}
    found = run(config(path, out, "answer", budget="30 updates", max_length=64, **settings))
    stages = [r["trial"]["stage"] for r in found.records() if r["kind"] == "Asked"]
    assert {"incumbent", "writer", "given", "trunk", "test"} <= set(stages)
    bundle = load(out).language
    records = bundle.read(path)
    assert all(p.value in r.context for p, r in zip(bundle.answer(records), records, strict=True))
    assert bundle.evaluate(path)["n"] == 120
    with pytest.raises(UserError, match="context"):
        bundle.predict(["what follows?"])
