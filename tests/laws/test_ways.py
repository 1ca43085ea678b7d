"""Laws of every way to write: it survives JSON, wraps what it says, costs the sum of its texts, and depends on its request alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from multistep.codec import Codec
from multistep.data.cells import Record, Turn
from multistep.examples import Examples
from multistep.generate import Written
from multistep.models.decoder import new_decoder
from multistep.models.seq2seq import new_seq2seq
from multistep.predictors.best_of import BestOf
from multistep.predictors.decoding import Beam, Decoding, Greedy, Sample
from multistep.predictors.draft_revise import DraftRevise
from multistep.predictors.few_shot import FewShot
from multistep.predictors.mbr import Mbr
from multistep.predictors.vote import Vote
from multistep.predictors.ways import WAYS, Way, plain, read_way, texts, with_plain, words
from multistep.subwords import train_bytes
from multistep.tasks.writing import Writing
from multistep.tune.speakers import _tokenizer_config
from multistep.types import UserError
from multistep.writing import Neural

LIMITS: dict[str, Any] = {"max_new_tokens": 8}
GREEDY, BEAM, DRAW = Greedy(**LIMITS), Beam(beams=4, **LIMITS), Sample(temperature=1.5, seed=3, **LIMITS)
EXAMPLES: tuple[Way, ...] = (  # one of each, and of each scorer, reading and template
    GREEDY, BEAM, DRAW,
    Mbr(inner=DRAW, n=5, utility="chrf"), Mbr(inner=BEAM, n=3, utility="bleu"), Mbr(inner=DRAW, n=4, utility="rougeL"),
    Mbr(inner=DRAW, n=4, utility="f1"), BestOf(inner=DRAW, n=4), BestOf(inner=DRAW, n=4, scorer="grounded"),
    Vote(inner=DRAW, n=5), Vote(inner=DRAW, n=5, reads="number"),
    DraftRevise(inner=GREEDY), DraftRevise(inner=Vote(inner=DRAW, n=3), rounds=2, again="Shorter."),
    FewShot(inner=GREEDY, k=2), FewShot(inner=DRAW, k=1, choose="seed", template="text", keep=3),
    FewShot(inner=DraftRevise(inner=BEAM), k=2, template="text"),
)  # fmt: skip
EACH = pytest.mark.parametrize("way", EXAMPLES, ids=words)
RECORDS = [Record(text, ("x",)) for text in ("one two", "three", "four five six seven", "one two three")]
SHOTS = [Record(f"say {n}", (f"{n} it is",)) for n in ("one", "two", "three", "four", "five")]
ALONE: tuple[tuple[Way, Decoding], ...] = (  # what gives what its inner gives
    (Mbr(inner=BEAM, n=1), BEAM), (Mbr(inner=DRAW, n=1), DRAW), (BestOf(inner=DRAW, n=1), DRAW), (Vote(inner=DRAW, n=1), DRAW),
    (DraftRevise(inner=GREEDY, rounds=0), GREEDY), (FewShot(inner=BEAM, k=0), BEAM), (FewShot(inner=DRAW, k=0), DRAW),
)  # fmt: skip


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    from multistep import dialogue

    folder: Path = tmp_path_factory.mktemp("codec")
    train_bytes(["one two three four five six seven", "it is what it is"] * 3, 300, folder / "tokenizer.json")
    _tokenizer_config(folder)
    found = Codec.load(folder)
    dialogue.ensure_template(found.tokenizer)
    return found


def model_of(codec: Codec, reads: str) -> Neural:
    import torch

    ids = {"pad": codec.pad, "bos": codec.bos, "eos": codec.eos}
    make = new_seq2seq if reads == "pairs" else new_decoder
    model = make(len(codec.tokenizer), 32, 1, 256, ids, 0).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    task = Writing(kind="translate" if reads == "pairs" else "chat")
    found = Neural(model, codec, task, reads, 256)  # pyright: ignore[reportArgumentType]
    found.pool = Examples(SHOTS, lambda r: r.source)
    return found


def written(neural: Neural, way: Way, records: Sequence[Record]) -> list[tuple[Any, Any]]:
    neural.decoding = way
    return [(p.value, p.confidence and round(p.confidence, 5)) for p in neural.write(records)]


def reading(way: Way) -> str:
    return "prompts" if isinstance(way, DraftRevise | FewShot) else "pairs"


@EACH
def test_it_survives_json(way: Way) -> None:
    assert read_way(json.loads(way.model_dump_json())) == way
    assert all(isinstance(way, WAYS) for way in EXAMPLES) and {type(w) for w in EXAMPLES} == set(WAYS)


@EACH
def test_its_words_are_its_own(way: Way) -> None:
    assert [w for w in EXAMPLES if words(w) == words(way)] == [way]
    changed = with_plain(way, plain(way).with_(repetition_penalty=1.3))
    assert words(changed) != words(way) and plain(changed).repetition_penalty == 1.3


@EACH
def test_an_answer_depends_on_its_request_alone(way: Way, codec: Codec, torch_seeded: None) -> None:
    neural = model_of(codec, reading(way))
    together = written(neural, way, RECORDS)
    assert together == written(neural, way, RECORDS[::-1])[::-1]
    assert together == [written(neural, way, [r])[0] for r in RECORDS]
    assert together == written(neural, way, RECORDS)


@pytest.mark.parametrize(("way", "inner"), ALONE)
def test_one_of_one_is_what_the_inner_gives(way: Way, inner: Decoding, codec: Codec, torch_seeded: None) -> None:
    neural = model_of(codec, reading(way))
    assert written(neural, way, RECORDS) == written(neural, inner, RECORDS)


class Counting:
    """A model that says the seed's number of words, and counts its texts."""

    def __init__(self) -> None:
        self.task = Writing(kind="chat")
        self.examples = Examples(SHOTS, lambda r: r.source)
        self.given = 0

    def candidates(self, records: Sequence[Record], decoding: Decoding, n: int) -> list[list[Written]]:
        self.given += len(records) * (decoding.beams if isinstance(decoding, Beam) else n)
        return [[Written([k + 1], -float(k), True) for k in range(n)] for _ in records]

    def said(self, written: Written) -> Any:
        from multistep.types import Prediction

        return Prediction(f"{written.ids[0]} words", 0.5)

    def asked(self, record: Record) -> tuple[Turn, ...]:
        return record.asked or (Turn("user", record.source),)

    def shortened(self, text: str, tokens: int) -> str:
        return " ".join(text.split()[:tokens])


@EACH
def test_its_cost_is_the_sum_of_its_texts(way: Way) -> None:
    from multistep.voting import answers

    model = Counting()
    assert len(answers(model, RECORDS, way)) == len(RECORDS)
    assert model.given == texts(way) * len(RECORDS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "gredy"}, "greedy"),
        ({"kind": "mbr", "inner": {"kind": "beam", "beams": 4}, "n": 5}, "4 beams"),
        ({"kind": "mbr", "inner": {"kind": "greedy"}}, "inner"),
        ({"kind": "vote", "inner": {"kind": "sample"}, "votes": 3}, "votes"),
        ({"kind": "best_of", "inner": {"kind": "sample"}, "n": 0}, "n"),
        ({"kind": "few_shot", "inner": {"kind": "few_shot"}}, "inner"),
    ],
)
def test_what_cannot_be_is_refused_by_name(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_way(data)


def test_prompts_are_needed_where_they_are_written(codec: Codec) -> None:
    neural = model_of(codec, "pairs")
    for way in (FewShot(inner=GREEDY, k=1), DraftRevise(inner=GREEDY)):
        with pytest.raises(UserError, match="prompts"):
            written(neural, way, RECORDS)
    prompts = model_of(codec, "prompts")
    prompts.pool = None
    with pytest.raises(UserError, match="holds 0"):
        written(prompts, FewShot(inner=GREEDY, k=1), RECORDS)


@EACH
def test_transformers_reads_what_it_has_words_for(way: Way, codec: Codec, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    from multistep.language_bundle import in_transformers_words, not_in_transformers_words

    neural = model_of(codec, reading(way))
    GenerationConfig(**in_transformers_words(way, neural)).save_pretrained(tmp_path)
    read, inner = GenerationConfig.from_pretrained(tmp_path), plain(way)
    assert read.max_new_tokens == 8 and read.num_beams == (inner.beams if isinstance(inner, Beam) else 1)
    assert read.do_sample == isinstance(inner, Sample)
    assert bool(not_in_transformers_words(way, neural)) == (way != inner or isinstance(inner, Sample))


def test_what_transformers_would_do_otherwise_is_named(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    from multistep import dialogue
    from multistep.language_bundle import in_transformers_words, not_in_transformers_words

    pairs, prompts = model_of(codec, "pairs"), model_of(codec, "prompts")
    assert not_in_transformers_words(Greedy(stop=("\n",)), pairs) == ("stop texts: '\\n'",)
    for penalized in (Greedy(repetition_penalty=1.2), Greedy(no_repeat_ngram=3)):
        counts = ("repetition penalties: there the prompt counts too",)
        assert (
            not_in_transformers_words(penalized, prompts) == counts
            and not_in_transformers_words(penalized, pairs) == ()
        )
    assert in_transformers_words(GREEDY, prompts)["eos_token_id"] == codec.eos
    monkeypatch.setattr(dialogue, "endings", lambda tokenizer: dialogue.Endings((codec.eos, 7), ("<|im_end|>",)))
    assert not_in_transformers_words(Greedy(stop=("\n",)), prompts) == ("stop texts: '\\n', '<|im_end|>'",)
    assert in_transformers_words(GREEDY, prompts)["eos_token_id"] == [codec.eos, 7]
    assert in_transformers_words(GREEDY, pairs)["eos_token_id"] == codec.eos
