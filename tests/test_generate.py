"""Tests of writing: steppers and the engine against transformers' own `generate`, and what may not depend on the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from multistep.generate import draw, generate, narrowed, several, shape, stream
from multistep.models.decoder import new_decoder
from multistep.models.seq2seq import new_seq2seq
from multistep.models.step import CachedDecoder, CachedSeq2Seq, LlamaSteps, M2MSteps, Stepper, stepper_of
from multistep.predictors.decoding import Beam, Greedy, Sample

IDS = {"pad": 0, "bos": 1, "eos": 2}
PROMPTS = [np.random.default_rng(n).integers(5, 60, size=n) for n in (5, 9, 13, 13, 3)]


@pytest.fixture(autouse=True)
def _one_thread(torch_seeded: None) -> None: ...


def _model(kind: str) -> Any:
    model = (new_decoder if kind == "decoder" else new_seq2seq)(60, 64, 2, 128, IDS, 0).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model


def _theirs(model: Any, prompt: np.ndarray, **how: Any) -> list[int]:
    ids = torch.from_numpy(prompt)[None]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, **how)[0]
    new = found.tolist()[1 if model.config.is_encoder_decoder else len(prompt) :]
    return [t for t in new if t not in (IDS["eos"], IDS["pad"])]


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_greedy_writes_what_transformers_writes(kind: str) -> None:
    model = _model(kind)
    for prompt, written in zip(PROMPTS, generate(model, PROMPTS, Greedy(max_new_tokens=20), [2]), strict=True):
        assert written.ids == _theirs(model, prompt)


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_beams_find_what_transformers_finds(kind: str) -> None:
    model = _model(kind)
    found = generate(model, PROMPTS, Beam(max_new_tokens=20, beams=3), [2])
    for prompt, written in zip(PROMPTS, found, strict=True):
        assert written.ids == _theirs(model, prompt, num_beams=3, early_stopping=False)


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
@pytest.mark.parametrize("decoding", [Greedy(max_new_tokens=12), Sample(max_new_tokens=12, top_p=0.9, seed=3)])
def test_an_answer_does_not_depend_on_the_batch(kind: str, decoding: Greedy | Sample) -> None:
    model = _model(kind)
    together = [w.ids for w in generate(model, PROMPTS, decoding, [2])]
    assert together == [w.ids for w in generate(model, PROMPTS, decoding, [2], batch=2)]
    if isinstance(decoding, Greedy):  # a sample's numbers are those of its place among the requests
        assert together == [generate(model, [p], decoding, [2])[0].ids for p in PROMPTS]


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("decoder", LlamaSteps, CachedDecoder),
        ("seq2seq", lambda m: M2MSteps(m, 1), lambda m: CachedSeq2Seq(m, 1)),
    ],
)
def test_steppers_agree_after_rows_are_dropped_repeated_and_reordered(kind: str, ours: Any, theirs: Any) -> None:
    model = _model(kind)
    steppers: list[Stepper] = [ours(model), theirs(model)]
    assert type(stepper_of(model)) is type(steppers[0])
    for_all = []
    for stepper in steppers:
        seen = [stepper.start(PROMPTS)]
        seen.append(stepper.step(torch.tensor([7, 8, 9, 10, 11])))
        stepper.keep(torch.tensor([4, 1, 1]))
        seen += [stepper.step(torch.tensor([n, n + 1, n + 2])) for n in range(5, 45)]
        stepper.keep(torch.tensor([2]))
        for_all.append([*seen, stepper.step(torch.tensor([5]))])
    for a, b in zip(*for_all, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_cache_grows_beyond_what_it_began_with() -> None:
    model = _model("decoder")
    whole = generate(model, [PROMPTS[0]], Greedy(max_new_tokens=100, min_new_tokens=100), [2])[0].ids
    ids = torch.tensor([[*PROMPTS[0].tolist(), *whole]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(PROMPTS[0]) - 1 : -1]
    logits[:, 2] = -torch.inf
    assert len(whole) == 100 and logits.argmax(-1).tolist() == whole


def test_stream_gives_the_same_tokens_as_they_come() -> None:
    model = _model("decoder")
    assert (
        list(stream(model, PROMPTS[0], Greedy(max_new_tokens=9), []))
        == generate(model, [PROMPTS[0]], Greedy(max_new_tokens=9), [])[0].ids
    )


def test_the_score_is_the_mean_log_probability() -> None:
    model = _model("decoder")
    written = generate(model, [PROMPTS[1]], Greedy(max_new_tokens=6), [])[0]
    ids = torch.tensor([[*PROMPTS[1].tolist(), *written.ids]])
    with torch.no_grad():
        logp = model(input_ids=ids).logits.log_softmax(-1)[0, len(PROMPTS[1]) - 1 : -1]
    assert written.score == pytest.approx(float(logp.gather(1, torch.tensor(written.ids)[:, None]).mean()), abs=1e-5)
    assert not written.ended


def test_stop_texts_end_the_writing_and_are_not_part_of_it() -> None:
    model = _model("decoder")

    def decode(ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)

    free = decode(generate(model, [PROMPTS[0]], Greedy(max_new_tokens=12), [])[0].ids)
    stop = free[5:7]
    for how in (Greedy(max_new_tokens=12, stop=(stop,)), Beam(max_new_tokens=12, beams=2, stop=(stop,))):
        written = generate(model, [PROMPTS[0]], how, [], decode=decode)[0]
        assert stop not in decode(written.ids)
    first = generate(model, [PROMPTS[0]], Greedy(max_new_tokens=12, stop=(stop,)), [], decode=decode)[0]
    assert first.ended and decode(first.ids) == free[: free.index(stop)]


def test_what_may_be_written_again() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    assert shape(logits, [[0, 1, 0]], Greedy(no_repeat_ngram=2), set(), 3)[0].tolist() == [1.0, -np.inf, -1.0, 0.5]
    assert shape(logits, [[1, 2]], Greedy(repetition_penalty=2.0), set(), 2)[0].tolist() == [1.0, 1.0, -2.0, 0.5]
    assert shape(logits, [[]], Greedy(min_new_tokens=1), {3}, 0)[0, 3] == -np.inf
    assert shape(logits, [[]], Greedy(min_new_tokens=1), {3}, 1)[0, 3] == 0.5


def test_narrowing_keeps_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def kept(**how: Any) -> list[bool]:
        return torch.isfinite(narrowed(logits, Sample(**how)))[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(min_p=0.25) == [True, True, True, False]


def test_samples_have_the_model_s_frequencies() -> None:
    model = _model("decoder")
    prompt = PROMPTS[0]
    with torch.no_grad():
        p = model(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1].softmax(-1).double().numpy()
    counts = np.zeros(60)
    for written in generate(model, [prompt] * 2000, Sample(max_new_tokens=1, seed=1), [], batch=500):
        counts[written.ids[0]] += 1
    expected = 2000 * p / p.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 59 + 4 * (2 * 59) ** 0.5  # chi-squared, four deviations
    assert draw(0, 1, 2) == draw(0, 1, 2) != draw(0, 2, 1)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        generate(_model("decoder"), [np.zeros(0, dtype=np.int64)], Greedy(), [2])


def test_tokenizers_for_writing_give_texts_back(tmp_path: Any) -> None:
    from multistep.subwords import train_bytes, train_characters

    texts = ["Hello  world\n\nnew 你好 line", "once more: hello world"]
    train_bytes(texts, 300, tmp_path / "bytes.json")
    train_characters(texts, tmp_path / "characters.json")
    for name, strange in (("bytes", "ψ 😀 </s>"), ("characters", "")):
        tokenizer = Tokenizer.from_file(str(tmp_path / f"{name}.json"))
        assert [tokenizer.token_to_id(t) for t in ("<pad>", "<s>", "</s>")] == [0, 1, 2]
        for text in [*texts, strange]:
            assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_several_draws_are_those_of_the_next_seeds(kind: str) -> None:
    model, drawn = _model(kind), Sample(max_new_tokens=12, temperature=1.3, seed=5)
    requests = [7, 7, 8, 9, 10]
    found = several(model, PROMPTS, drawn, [2], 3, requests=requests)
    for k in range(3):
        alone = several(model, PROMPTS, drawn.with_(seed=5 + k), [2], 1, batch=2, requests=requests)
        assert [row[k].ids for row in found] == [row[0].ids for row in alone]
        assert [row[k].score for row in found] == pytest.approx([row[0].score for row in alone], abs=1e-5)
    assert len({tuple(w.ids) for row in found for w in row}) > len(PROMPTS)
    backwards = several(model, PROMPTS[::-1], drawn, [2], 3, requests=requests[::-1])
    assert [[w.ids for w in row] for row in backwards[::-1]] == [[w.ids for w in row] for row in found]


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_the_best_of_a_beam_are_those_of_transformers(kind: str) -> None:
    model = _model(kind)
    found = several(model, PROMPTS, Beam(max_new_tokens=10, beams=4), [2], 3)
    for prompt, row in zip(PROMPTS, found, strict=True):
        ids = torch.from_numpy(prompt)[None]
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, num_beams=4, early_stopping=False,
            num_return_sequences=3,
        )  # fmt: skip
        start = 1 if model.config.is_encoder_decoder else len(prompt)
        wanted = [[t for t in line[start:] if t not in (IDS["eos"], IDS["pad"])] for line in theirs.tolist()]
        assert [w.ids for w in row] == wanted
    with pytest.raises(ValueError, match="greedy"):
        several(model, PROMPTS, Greedy(), [2], 2)
