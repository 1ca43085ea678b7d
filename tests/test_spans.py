"""Tests of spans by an encoder: windows cover everything, targets are the answers, the model comes back from the disk as others
load it, and training finds what can be found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from multistep.budget import parse_budget
from multistep.data.cells import Record
from multistep.metrics.words import f1
from multistep.models.spans import SpanEncoder, load_span_encoder, new_span_encoder, save_span_encoder
from multistep.objectives import Span
from multistep.optimizers import AdamW
from multistep.spans import SpanRows, best_least
from multistep.state import TrainState
from multistep.strategy import TrainModule
from multistep.subwords import load_tokenizer, pair_frame, train_tokenizer
from multistep.train import train
from multistep.types import Prediction, UserError

WORDS = [f"{a}{b}" for a in "bcdfglmnprst" for b in ("ane", "ilo", "ork", "ump")]


def record(rng: np.random.Generator, n_words: int = 12, answered: bool = True) -> Record:
    """The answer is the word behind the one that is asked for."""
    words = [str(w) for w in rng.choice(WORDS, n_words, replace=False)]
    k = int(rng.integers(n_words - 1))
    context = " ".join(words)
    if not answered:
        return Record(f"after {rng.choice([w for w in WORDS if w not in words])}", ("",), context, (-1,))
    start = len(" ".join(words[: k + 1])) + 1
    return Record(f"after {words[k]}", (words[k + 1],), context, (start,))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([*WORDS * 3, "after", "王明于1921年迁居北京。何时哪里？" * 3], 400, path)
    return load_tokenizer(str(path.parent))


def model_for(tokenizer: Tokenizer, max_length: int = 64) -> SpanEncoder:
    model = new_span_encoder(tokenizer.get_vocab_size(), 0, 32, 2, max_length, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=generator))
    return model


def certain(rows: SpanRows) -> torch.nn.Module:
    """Logits that put everything on the targets of a row."""

    class Oracle(torch.nn.Module):
        def forward(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, segments_BT: torch.Tensor) -> torch.Tensor:
            logits_BT2 = torch.zeros(*ids_BT.shape, 2)
            for row, ids in enumerate(ids_BT):
                (places,) = [
                    place
                    for ids_W, place in table
                    if torch.equal(ids_W, ids[: len(ids_W)]) and not ids[len(ids_W) :].any()
                ]
                for side in (0, 1):
                    logits_BT2[row, places[side], side] = 50.0
            return logits_BT2

    table = []
    for window in range(len(rows.windows)):
        (ids_BT, *_), places_B2 = rows.load(np.array([window]))
        table.append((ids_BT[0], places_B2[0].tolist()))
    return Oracle()


@pytest.mark.parametrize("overlap", [None, 0, 5])
def test_windows_cover_every_token_of_every_passage(tokenizer: Tokenizer, overlap: int | None) -> None:
    rng = np.random.default_rng(0)
    records = [record(rng, n) for n in (3, 12, 40, 48)]
    rows = SpanRows(records, tokenizer, 30, 0, "cpu", overlap)
    for i, _ in enumerate(records):
        own = [w for w in rows.windows if w.record == i]
        covered = sorted({t for w in own for t in range(w.first, w.end)})
        assert covered == list(range(len(rows._tokens(i))))
        assert (len(own) > 1) == (i > 1)
    assert rows.lengths_N.max() <= 30 and rows.facts()["windows"] == len(rows.windows) > 4
    order = rows.order(3, 0)
    assert sorted(np.concatenate([order.at(i) for i in range(order.per_epoch)]).tolist()) == rows.taught.tolist()


def test_rows_are_framed_as_the_tokenizer_joins_pairs(tokenizer: Tokenizer) -> None:
    question, context = "after bane", "cilo bane dork"
    rows = SpanRows([Record(question, ("dork",), context, (10,))], tokenizer, 40, 0, "cpu")
    (ids, mask, segments, allowed), places = rows.load(np.array([0]))
    tokens = [tokenizer.id_to_token(i) for i in ids[0].tolist()]
    assert tokens[0] == "[CLS]" and tokens.count("[SEP]") == 2 and tokens[-1] == "[SEP]" and bool(mask.all())
    first = tokens.index("[SEP]") + 1
    assert segments[0].tolist() == [0] * first + [1] * (len(tokens) - first)
    assert allowed[0].tolist() == [True] + [False] * (first - 1) + [True] * (len(tokens) - first - 1) + [False]
    start, end = places[0].tolist()
    assert "".join(str(t).removeprefix("##") for t in tokens[start : end + 1]) == "dork"
    assert rows.tokens(np.array([0])) == len(tokens)


def test_the_frame_is_that_of_bert() -> None:
    from multistep.models.source import packaged_encoder

    folder = packaged_encoder()
    if folder is None:
        pytest.skip("the packaged encoder is not installed: install multistep[encoder]")
    tokenizer = load_tokenizer(folder)
    frame = pair_frame(tokenizer)
    assert (frame.before, frame.between, frame.after, frame.segments) == ([101], [102], [102], (0, 0, 0, 1, 1))
    question, context = "Who was Zoë?", "Zoë—a poet, naïve (1901–1950)."
    rows = SpanRows([Record(question, ("a poet",), context, (4,))], tokenizer, 64, 0, "cpu")
    (ids, _, segments, _), _ = rows.load(np.array([0]))
    whole = tokenizer.encode(question, context)
    assert ids[0].tolist() == whole.ids and segments[0].tolist() == whole.type_ids


def test_a_model_that_is_certain_gives_the_right_answers(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    records = [record(rng, n, answered=i % 3 != 2) for i, n in enumerate((5, 12, 12, 40, 44, 30))]
    chinese = "王明于1921年迁居北京。"
    records += [Record("何时", ("1921年",), chinese, (3,)), Record("哪里", ("北京",), chinese, (10,))]
    rows = SpanRows(records, tokenizer, 40, 0, "cpu")
    oracle = certain(rows)
    found = rows.answers(oracle, least=0.5)  # pyright: ignore[reportArgumentType]
    assert [p.value for p in found] == [r.targets[0] for r in records]
    assert all(p.confidence is not None and p.confidence > 0.99 for p in found)
    some = np.arange(len(rows.windows))
    loss = Span().loss(rows.outputs(oracle, rows.load(some)[0]), rows.load(some)[1])  # pyright: ignore[reportArgumentType]
    assert float(loss) < 1e-6
    facts = rows.facts()
    assert facts["apart"] == 0 and facts["records"] == 8 and facts["with_answer"] == 6


def test_spans_are_verbatim_short_enough_and_the_best(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(1)
    records = [record(rng, n) for n in (1 + 1, 12, 40)]
    rows, model = SpanRows(records, tokenizer, 40, 0, "cpu"), model_for(tokenizer)
    for longest in (1, 4):
        found = rows.answers(model, longest)
        for i, (prediction, r) in enumerate(zip(found, records, strict=True)):
            assert prediction.value and prediction.value in r.context
            best = (-np.inf, 0.0)
            for w in [w for w, window in enumerate(rows.windows) if window.record == i]:
                inputs, _ = rows.load(np.array([w]))
                log_T2 = torch.log_softmax(rows.outputs(model, inputs), 1)[0].detach().numpy()
                inside = [t for t in np.flatnonzero(inputs[3][0].numpy()).tolist() if t > 0]
                pairs = [(a, b) for a in inside for b in inside if a <= b < a + longest]
                top = max(log_T2[a, 0] + log_T2[b, 1] for a, b in pairs)
                best = max(best, (float(top), float(1 / (1 + np.exp(log_T2[0].sum() - top)))))
            assert prediction.confidence == pytest.approx(best[1], abs=1e-5)
    every = rows.answers(model, 4, least=1.1)
    assert all(p.value == "" for p in every)


def test_what_cannot_be_taught_is_counted_and_answered(tokenizer: Tokenizer) -> None:
    records = [
        Record("after bane", ("nowhere",), "cilo bane dork", (-1,)),  # right, but not in the passage
        Record("after bane", (), "cilo bane dork"),  # unknown
        Record("after bane", ("",), "cilo bane dork", (-1,)),  # no answer
        Record("after bane", ("",), "", (-1,)),  # nothing to read
        Record("bane " * 40, ("dork",), "cilo bane dork", (10,)),  # a question longer than the row
    ]
    rows = SpanRows(records, tokenizer, 30, 0, "cpu")
    facts = rows.facts()
    assert (facts["not_taught"], facts["cut_questions"], len(rows)) == (2, 1, 3)
    assert rows.lengths_N.max() <= 30
    found = rows.answers(model_for(tokenizer))
    assert [bool(p.value) for p in found] == [True, True, True, False, True] and found[3].confidence == 0.0
    long = SpanRows([Record("after", ("cilo bane dork " * 12,), "cilo bane dork " * 12, (0,))], tokenizer, 30, 0, "cpu")
    assert long.facts()["apart"] == 1 and long.load(np.array([0]))[1].tolist() == [[0, 0]]
    with pytest.raises(UserError, match="no room for a passage"):
        SpanRows(records, tokenizer, 12, 0, "cpu")


def test_the_folder_loads_elsewhere_and_gives_the_same_logits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForQuestionAnswering

    rng = np.random.default_rng(0)
    records = [record(rng, n) for n in (4, 12, 40)]
    model = model_for(tokenizer).eval()
    save_span_encoder(model, tmp_path)
    rows = SpanRows(records, tokenizer, 40, 0, "cpu")
    again = load_span_encoder(tmp_path)
    assert rows.answers(again) == rows.answers(model) and (again.max_tokens, again.n_layers) == (64, 2)
    (ids, mask, segments, _), _ = rows.load(np.arange(2))
    elsewhere = AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs = elsewhere(input_ids=ids, attention_mask=mask.long(), token_type_ids=segments)
        ours = model(ids, mask, segments)
        hidden = AutoModel.from_pretrained(tmp_path).eval()(ids, mask.long(), segments).last_hidden_state
    torch.testing.assert_close(torch.stack([theirs.start_logits, theirs.end_logits], 2)[mask], ours[mask])
    torch.testing.assert_close(model.head(hidden)[mask], ours[mask])


def test_an_encoder_without_a_head_gets_one_of_zeros(tmp_path: Path) -> None:
    from multistep.models.decoder import new_decoder
    from multistep.models.encoder import new_backbone

    new_backbone(100, 0, 32, 1, 32, seed=0).save_pretrained(tmp_path / "encoder")
    model = load_span_encoder(tmp_path / "encoder")
    assert not model.head.weight.any() and model.head.out_features == 2
    new_decoder(100, 32, 1, 32, {"pad": 0, "bos": 1, "eos": 2}, 0).save_pretrained(tmp_path / "decoder")
    with pytest.raises(UserError, match="not an encoder"):
        load_span_encoder(tmp_path / "decoder")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_span_encoder(tmp_path)


def test_training_finds_what_can_be_found(tokenizer: Tokenizer, torch_seeded: None) -> None:
    rng = np.random.default_rng(0)
    records = [record(rng, 6, answered=i % 4 != 3) for i in range(64)]
    rows = SpanRows(records, tokenizer, 40, 0, "cpu")
    state = TrainState(model_for(tokenizer))
    before = np.mean([f1(p.value, r.targets[0]) for p, r in zip(rows.answers(state.model, 4), records, strict=True)])
    state.begin(TrainModule(optimizer=AdamW(lr=3e-3), objective=Span(), batch_size=16), parse_budget("300 updates"))
    losses = [m.loss_nats for m in train(state, rows)]
    found = rows.answers(state.model, rows.longest)
    least = best_least(found, records, lambda text, targets: max(f1(text, t) for t in targets))
    told = [p.value for p in rows.answers(state.model, rows.longest, least)]
    after = np.mean([f1(t, r.targets[0]) for t, r in zip(told, records, strict=True)])
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20]) and after > before + 0.4


def test_the_least_confidence_is_only_for_data_with_unanswerable_questions() -> None:
    answered, empty = Record("q", ("a",), "a", (0,)), Record("q", ("",), "b", (-1,))
    given = [Prediction("a", 0.9), Prediction("b", 0.2)]
    assert best_least(given, [answered, answered], lambda text, targets: 1.0) == 0.0
    assert 0.2 < best_least(given, [answered, empty], lambda text, targets: float(text in targets)) <= 0.9
