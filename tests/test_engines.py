"""Tests of engines: what other libraries compute is what the model computes, files know their weights, bundles obey or say why not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import LABELS, WORDS, tiny_encoder
from test_generate import PROMPTS
from tokenizers import Tokenizer

from multistep import engines
from multistep.bundle import load_bundle, write_bundle
from multistep.codec import Codec
from multistep.data.cells import Record
from multistep.data.shapes import Layout
from multistep.engines import Runtime, agree, prepare, variants
from multistep.engines import runtime as runtimes
from multistep.evaluate import EncoderText
from multistep.generate import generate
from multistep.language_bundle import LanguageBundle, load_language_bundle, write_language_bundle
from multistep.models.encoder import Encoder, load_backbone
from multistep.models.lstm import new_lstm
from multistep.other_writers import Counted
from multistep.predictors import Single
from multistep.predictors.decoding import Beam, Decoding, Greedy, Sample
from multistep.subwords import encode_ids, load_tokenizer, train_bytes
from multistep.tasks import Classify
from multistep.tasks.writing import Writing
from multistep.types import UserError
from multistep.writing import Neural

TASK = Classify(labels=LABELS)
TEXTS = [" ".join(WORDS[(i * 7 + j) % 16] for j in range(1 + i % 9)) + f" {i}" for i in range(24)]


@pytest.fixture(autouse=True)
def _one_thread(torch_seeded: None) -> None: ...


def needs(name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'multistep[{name}]'")


def encoder_text(folder: Path, kind: str = "bert") -> EncoderText:
    tokenizer = load_tokenizer(str(tiny_encoder(folder)))
    if kind == "lstm":
        model: Any = new_lstm(400, 0, 32, 3, 0)
    elif kind == "distilbert":
        from transformers import DistilBertConfig, DistilBertModel

        config = DistilBertConfig(
            vocab_size=400, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64, pad_token_id=0
        )
        model = Encoder(DistilBertModel(config), 3)
    else:
        model = Encoder(load_backbone(str(folder)), 3)
    with torch.no_grad():
        model.head.weight.copy_(0.3 * torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(0)))
    return EncoderText(model.eval(), lambda texts: encode_ids(tokenizer, texts, 32)[0], 0, scale=2.0, mean=0.5)


# ---------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("kind", ["bert", "distilbert", "lstm"])
def test_onnx_gives_the_logits_of_the_model(tmp_path: Path, kind: str) -> None:
    needs("onnxruntime")
    model = encoder_text(tmp_path / "encoder", kind)
    found = prepare(model, Runtime(runtime="onnx", batch=5), tmp_path)
    np.testing.assert_allclose(found.logits(TEXTS), model.logits(TEXTS), atol=2e-5)
    assert found.logits([]).shape == (0, 3)


def test_weights_of_8_bits_do_not_let_a_text_depend_on_its_batch(tmp_path: Path) -> None:
    needs("onnxruntime")
    model = encoder_text(tmp_path / "encoder")
    found = prepare(model, Runtime(runtime="onnx", dtype="int8"), tmp_path)
    together = found.logits(TEXTS)
    np.testing.assert_allclose(np.concatenate([found.logits([t]) for t in TEXTS]), together, atol=1e-5)
    apart = np.abs(together - model.logits(TEXTS)).max()
    assert 1e-4 < apart < 0.2  # they are not the same numbers, and close


def test_bf16_and_batches_on_torch(tmp_path: Path) -> None:
    model = encoder_text(tmp_path / "encoder")
    before = torch.get_num_threads()
    same = prepare(model, Runtime(batch=1, threads=2), tmp_path)
    np.testing.assert_allclose(same.logits(TEXTS), model.logits(TEXTS), atol=1e-5)
    assert torch.get_num_threads() == before
    half = prepare(model, Runtime(dtype="bf16"), tmp_path)
    apart = np.abs(half.logits(TEXTS) - model.logits(TEXTS)).max()
    assert 1e-5 < apart < 0.1
    assert next(model.model.parameters()).dtype == torch.float32  # the model itself is left as it was
    assert not (tmp_path / "engines").exists()


def test_every_variant_can_be_prepared_and_agrees(tmp_path: Path) -> None:
    for kind in ("bert", "lstm"):
        model = encoder_text(tmp_path / kind / "encoder", kind)
        found = variants(model)
        assert found[0] == ("torch-fp32", Runtime())
        for name, runtime in found:
            agreement = agree(model, prepare(model, runtime, tmp_path / kind), TEXTS, TASK)
            assert agreement.ok and agreement.n == len(TEXTS), (name, agreement.words)


def test_engines_that_are_not_there_are_named(tmp_path: Path) -> None:
    model = encoder_text(tmp_path / "encoder")
    lstm = encoder_text(tmp_path / "other", "lstm")
    for which, runtime in (
        (model, Runtime(dtype="int8")),
        (model, Runtime(runtime="ctranslate2")),
        (lstm, Runtime(runtime="onnx", dtype="int8")),
        (lstm, Runtime(dtype="bf16")),
    ):
        with pytest.raises(UserError, match=f"{runtime.name}: no engine .* Known: torch-fp32"):
            prepare(which, runtime, tmp_path)
    with pytest.raises(UserError, match="lookup is for models that write"):
        prepare(model, Runtime(lookup=3), tmp_path)


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.util, "find_spec", lambda name: None)
    model = encoder_text(tmp_path / "encoder")
    assert all(r.runtime == "torch" for _, r in variants(model))
    with pytest.raises(UserError, match=r"onnxruntime is not installed.*multistep\[onnx\]"):
        prepare(model, Runtime(runtime="onnx"), tmp_path)
    with pytest.raises(UserError, match=r"ctranslate2 is not installed.*multistep\[ctranslate2\]"):
        prepare(writer(tmp_path, "decoder"), Runtime(runtime="ctranslate2"), tmp_path)


def test_files_of_other_weights_are_refused_and_made_again(tmp_path: Path) -> None:
    needs("onnxruntime")
    model, runtime = encoder_text(tmp_path / "encoder"), Runtime(runtime="onnx")
    with pytest.raises(UserError, match=r"is not there.*multistep tune"):
        prepare(model, runtime, tmp_path, make=False)
    prepare(model, runtime, tmp_path)
    graph = tmp_path / "engines" / "onnx-fp32" / "model.onnx"
    written = graph.stat().st_mtime_ns
    prepare(model, runtime, tmp_path)
    assert graph.stat().st_mtime_ns == written  # what is there is not made again
    with torch.no_grad():
        model.model.head.bias.add_(1.0)
    with pytest.raises(UserError, match="of other weights"):
        prepare(model, runtime, tmp_path, make=False)
    np.testing.assert_allclose(prepare(model, runtime, tmp_path).logits(TEXTS), model.logits(TEXTS), atol=2e-5)
    assert not [p for p in (tmp_path / "engines").iterdir() if p.name.startswith(".")]
    graph.write_bytes(b"not a graph")
    with pytest.raises(UserError, match="cannot read it"):
        prepare(model, runtime, tmp_path)


def label_bundle(tmp_path: Path, **extra: Any) -> tuple[Path, EncoderText]:
    model = encoder_text(tmp_path / "encoder")
    tokenizer = load_tokenizer(str(tmp_path / "encoder"))
    folder = tmp_path / "model"
    write_bundle(folder, TASK, Single(model="encoder"), {"encoder": model}, tokenizer, 32, extra)
    return folder, model


def test_a_bundle_that_gives_labels_obeys_its_engine(tmp_path: Path) -> None:
    needs("onnxruntime")
    folder, model = label_bundle(tmp_path, engine={"encoder": {"runtime": "onnx"}, "threads": 1, "batch": 3})
    with pytest.raises(UserError, match="onnx-fp32 runs is not there"):
        load_bundle(folder)
    prepare(model, Runtime(runtime="onnx"), folder)
    bundle = load_bundle(folder)
    assert not isinstance(bundle, LanguageBundle)
    assert isinstance(bundle.engine.models["encoder"], engines.OnnxText)
    assert (bundle.engine.threads, bundle.engine.batch) == (1, 3)
    np.testing.assert_allclose(bundle.scored(TEXTS)[0], model.logits(TEXTS), atol=2e-5)
    assert len(bundle.predict([])) == 0


def test_an_engine_with_a_wrong_key_is_said(tmp_path: Path) -> None:
    folder, _ = label_bundle(tmp_path, engine={"encoder": {"runtime": "onnxx"}})
    with pytest.raises(UserError, match="engine"):
        load_bundle(folder)


# ---------------------------------------------------------------------------------------------- models that write


GREEDY = Greedy(max_new_tokens=12)


def writer(tmp_path: Path, kind: str, decoding: Decoding = GREEDY) -> Neural:
    """A tokenizer of bytes (it has no token for unknown ones), and a model with some ids more than that has tokens."""
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "bytes.json"
    if not path.exists():
        train_bytes(TEXTS, 300, path, ends=kind == "seq2seq")
    tokenizer = Tokenizer.from_file(str(path))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    from multistep.models.decoder import new_decoder
    from multistep.models.seq2seq import new_seq2seq

    make = new_decoder if kind == "decoder" else new_seq2seq
    model = make(tokenizer.get_vocab_size() + 5, 64, 2, 128, {"pad": 0, "bos": 1, "eos": 2}, 0).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    reads, task = ("stream", Writing(kind="lm")) if kind == "decoder" else ("pairs", Writing(kind="translate"))
    return Neural(model, Codec(fast), task, reads, 64, decoding)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_ctranslate2_writes_what_our_engine_writes(tmp_path: Path, kind: str) -> None:
    needs("ctranslate2")
    neural = writer(tmp_path, kind)
    pen = prepare(neural, Runtime(runtime="ctranslate2", batch=2), tmp_path).pen
    assert pen is not None
    prompts = [p + 60 for p in PROMPTS]
    free = generate(neural.model, prompts, Greedy(max_new_tokens=16), [])
    some = [free[0].ids[5], free[2].ids[2]]  # what is written ends a text
    ended = []
    for ends, decoding in (
        ([2], Greedy(max_new_tokens=16)),
        (some, Greedy(max_new_tokens=16)),
        ([], Greedy(max_new_tokens=16)),
        (some, Greedy(max_new_tokens=16, min_new_tokens=8)),
        ([2], Beam(max_new_tokens=16, beams=3)),
        (some, Beam(max_new_tokens=16, beams=3, length_penalty=0.0)),  # with others searches end at other moments
    ):
        ours, theirs = generate(neural.model, prompts, decoding, ends), pen.write(prompts, decoding, ends)
        assert [(w.ids, w.ended) for w in theirs] == [(w.ids, w.ended) for w in ours], (ends, decoding)
        assert [w.score for w in theirs] == pytest.approx([w.score for w in ours], abs=1e-3)
        ended += [w.ended for w in theirs]
    assert any(ended) and not all(ended)


def test_a_model_of_another_class_goes_through_the_converter(tmp_path: Path) -> None:
    needs("ctranslate2")
    from transformers import CTRLConfig, CTRLLMHeadModel, GPT2Config, GPT2LMHeadModel

    neural = writer(tmp_path, "decoder")
    config = GPT2Config(vocab_size=305, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    gpt2 = replace(neural, model=GPT2LMHeadModel(config).eval())
    pen = prepare(gpt2, Runtime(runtime="ctranslate2"), tmp_path).pen
    assert pen is not None
    expected = generate(gpt2.model, PROMPTS, neural.decoding, [2])
    assert [w.ids for w in pen.write(PROMPTS, neural.decoding, [2])] == [w.ids for w in expected]
    ctrl = CTRLLMHeadModel(CTRLConfig(vocab_size=305, n_positions=64, n_embd=32, dff=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"no conversion of a CTRLLMHeadModel .*Use the runtime torch"):
        prepare(replace(neural, model=ctrl), Runtime(runtime="ctranslate2"), tmp_path / "other")
    assert not list((tmp_path / "other" / "engines").iterdir())


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_ctranslate2_minds_stop_texts_and_repetitions(tmp_path: Path, kind: str) -> None:
    needs("ctranslate2")
    neural = writer(tmp_path, kind)
    pen = prepare(neural, Runtime(runtime="ctranslate2"), tmp_path).pen
    assert pen is not None

    def decode(ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)

    for decoding in (
        Greedy(max_new_tokens=16, stop=("a", "qq")),
        Greedy(max_new_tokens=16, repetition_penalty=1.3),
        Greedy(max_new_tokens=16, no_repeat_ngram=2),
    ):
        ours = generate(neural.model, PROMPTS, decoding, [2], decode=decode)
        theirs = pen.write(PROMPTS, decoding, [2], decode)
        assert [(w.ids, w.ended) for w in theirs] == [(w.ids, w.ended) for w in ours], decoding
        if decoding.stop:  # under penalties its scores are those of the model without them
            assert [w.score for w in theirs] == pytest.approx([w.score for w in ours], abs=1e-4)


def test_what_ctranslate2_does_not_write_is_refused(tmp_path: Path) -> None:
    needs("ctranslate2")
    runtime = Runtime(runtime="ctranslate2")
    for decoding, why in ((Sample(), "no seed"), (Beam(stop=("x",)), "no stop texts")):
        neural = writer(tmp_path, "decoder", decoding)
        assert all(r.runtime == "torch" for _, r in variants(neural))
        with pytest.raises(UserError, match=why):
            prepare(neural, runtime, tmp_path)
    pen = prepare(writer(tmp_path, "seq2seq"), runtime, tmp_path / "s").pen
    assert pen is not None
    with pytest.raises(UserError, match="2048 positions"):
        pen.write(PROMPTS, Greedy(max_new_tokens=5000), [2])


def test_every_pen_writes_the_same_and_a_bundle_obeys_its_engine(tmp_path: Path) -> None:
    records = [Record(t, ("up up",)) for t in TEXTS[:8]]
    neural = writer(tmp_path, "seq2seq")
    folder, layout = tmp_path / "model", Layout(task="translate", form="pair", source=("source",), target="target")
    write_language_bundle(folder, neural.task, layout, neural, {"kind": "seq2seq"}, {"metric": "bleu"})
    expected = [p.value for p in neural.write(records)]
    for name, runtime in variants(neural):
        found = prepare(neural, runtime, folder)
        agreement = agree(neural, found, records, metric="bleu")
        assert agreement.ok, (name, agreement.words)
        if runtime.dtype == "fp32":
            assert [p.value for p in found.write(records)] == expected
        info = json.loads((folder / "multistep.json").read_text())
        standing = {"kind": "seq2seq", "decoding": neural.decoding.model_dump(mode="json")}
        info |= {"engine": runtime.model_dump(mode="json"), "standing": standing}
        loaded = load_language_bundle(folder, info).speaker
        assert isinstance(loaded, Neural) and loaded.pen is not None
        assert [p.value for p in loaded.write(records)] == [p.value for p in found.write(records)]


def test_lookup_is_for_greedy_writing(tmp_path: Path) -> None:
    neural = writer(tmp_path, "decoder", Sample())
    with pytest.raises(UserError, match="lookup is for greedy writing, not for sample"):
        prepare(neural, Runtime(lookup=4), tmp_path)


# ---------------------------------------------------------------------------------------------- agreement


class Shifted:
    """A text model whose logits are off by noise."""

    def __init__(self, model: EncoderText, noise: float):
        self.model, self.noise = model, noise

    def logits(self, texts: Any) -> np.ndarray:
        found = self.model.logits(texts)
        return found + self.noise * np.random.default_rng(0).normal(size=found.shape)


def test_agreement_is_refused_with_the_numbers(tmp_path: Path) -> None:
    model = encoder_text(tmp_path / "encoder")
    assert agree(model, model, TEXTS, TASK).ok
    assert agree(model, Shifted(model, 1e-3), TEXTS, TASK).ok
    off = agree(model, Shifted(model, 3.0), TEXTS, TASK)
    assert not off.ok and off.largest is not None and off.largest > 0.1
    assert off.words.startswith("refused: probabilities: apart by 0.") and "% of decisions the same" in off.words
    assert not agree(model, Shifted(model, float("nan")), TEXTS, TASK).ok


def test_a_text_alone_counts_as_much_as_one_in_a_batch(tmp_path: Path) -> None:
    model = encoder_text(tmp_path / "encoder")

    class WrongAlone:
        def logits(self, texts: Any) -> np.ndarray:
            return model.logits(texts) * (-1.0 if len(texts) == 1 else 1.0)

    assert not agree(model, WrongAlone(), TEXTS, TASK).ok


def test_texts_agree_by_their_metric_or_by_being_the_same(tmp_path: Path) -> None:
    records = [Record(t, (t,)) for t in TEXTS[:4]]

    class Says:
        def __init__(self, *texts: str):
            self.texts = texts

        def write(self, records: Any) -> Any:
            from multistep.types import Prediction

            return [Prediction(t) for t in self.texts]

        def losses(self, records: Any, running: bool) -> None: ...

    right, worse = Says(*[r.source for r in records]), Says(*[r.source for r in records[:3]], "nothing of it")
    assert agree(right, right, records, metric="bleu").ok
    assert agree(worse, right, records, metric="bleu").ok  # another text, a better score
    found = agree(right, worse, records, metric="bleu")
    assert not found.ok and found.same == 0.75 and found.points is not None and found.points < -0.3
    assert "75.0 % of 4 texts the same, bleu -" in found.words
    assert not agree(worse, right, records).ok  # without a metric only the same text is right


def test_an_engine_is_not_for_what_has_only_one(tmp_path: Path) -> None:
    from multistep.models.ngram import NGram

    neural = writer(tmp_path, "decoder")
    speaker = Counted(NGram.fit(TEXTS), neural.codec)
    write_language_bundle(
        tmp_path / "m", neural.task, Layout(task="lm", form="text", source=("text",)), speaker, {"kind": "ngram"}, {}
    )
    info = json.loads((tmp_path / "m" / "multistep.json").read_text()) | {"engine": {"runtime": "ctranslate2"}}
    with pytest.raises(UserError, match="has one engine"):
        load_language_bundle(tmp_path / "m", info)


def test_replacing_the_pen_leaves_the_model_alone(tmp_path: Path) -> None:
    neural = writer(tmp_path, "decoder")
    found = prepare(neural, Runtime(batch=1), tmp_path)
    assert neural.pen is None and found.model is neural.model and replace(found, pen=None).pen is None
