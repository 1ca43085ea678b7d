"""Models that write, at the edges of their texts: words that spell special tokens, windows that are nearly full of answer, positions that
end, and draws that belong to their own text."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_language
from runs import run, tiny_encoder
from test_language import config, talks, tiny_llama

from multistep.budget import Budget
from multistep.codec import Codec
from multistep.comparison import front
from multistep.data.cells import Record
from multistep.models.decoder import new_decoder
from multistep.models.ngram import NGram
from multistep.other_writers import Counted, Mixed
from multistep.predictors.decoding import Sample
from multistep.subwords import train_bytes, train_characters
from multistep.tasks.writing import Writing
from multistep.tune import measuring
from multistep.tune.speakers import _tokenizer_config
from multistep.types import UserError
from multistep.writing import Neural

AS_IT_IS = {"width": None, "depth": None, "tokenizer": "auto", "vocabulary": None}  # of a model that is given
SPELLED = "an <unk> of </s> and <s> or <pad>, said <unk>. "


@pytest.mark.parametrize("train", [train_characters, lambda texts, path: train_bytes(texts, 300, path)])
def test_what_spells_a_special_token_is_text(tmp_path: Path, train: object) -> None:
    assert callable(train)
    train([SPELLED * 20], tmp_path / "tokenizer.json")
    _tokenizer_config(tmp_path)
    codec = Codec.load(tmp_path)
    (ids,) = codec.pieces([SPELLED])
    assert not {codec.bos, codec.eos, codec.pad, codec.unknown} & set(ids.tolist())
    assert codec.text(ids.tolist()) == SPELLED
    if train is train_characters:
        assert len(ids) == len(SPELLED), "a token a character, as a mixture takes for granted"
    backend = codec.tokenizer.backend_tokenizer
    assert codec.eos in backend.encode("</s>", add_special_tokens=False).ids, (
        "a conversation's template is read as before"
    )


def mixed(folder: Path) -> Mixed:
    train_characters([SPELLED * 20], folder / "tokenizer.json")
    _tokenizer_config(folder)
    codec = Codec.load(folder)
    ids = {"pad": codec.pad, "bos": codec.bos, "eos": codec.eos}
    model = new_decoder(len(codec.tokenizer), 32, 1, 64, ids, 0)
    way = Sample(temperature=0.9, max_new_tokens=12, seed=3)
    return Mixed(
        Neural(model, codec, Writing(kind="lm"), "stream", 64, way), Counted(NGram.fit([SPELLED * 20]), codec), 0.5
    )


def test_a_mixture_charges_texts_that_spell_special_tokens(tmp_path: Path) -> None:
    losses = mixed(tmp_path).losses([Record("", (SPELLED,))], running=True)
    assert losses[0, 2] == len(SPELLED)


def test_a_draw_of_a_mixture_is_its_own_texts(tmp_path: Path) -> None:
    model = mixed(tmp_path)
    first, second = Record("an ", ("",)), Record("of ", ("",))
    together = [p.value for p in model.write([first, second])]
    assert together == [model.write([r])[0].value for r in (first, second)]
    assert together == [p.value for p in model.write([second, first])][::-1]


def test_half_of_the_window_is_the_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LEAST_TARGETS", 10)
    settings = {**AS_IT_IS, "model": str(tiny_llama(tmp_path / "llama"))}
    monkeypatch.setattr(test_language, "ZAHLEN", [word * 8 for word in test_language.ZAHLEN])
    found = run(config(talks(tmp_path), tmp_path / "run", "chat", budget="4 updates", max_length=64, **settings))
    (facts,) = [r["facts"] for r in found.records() if r["kind"] == "Noted" and r["what"] == "profiled"]
    assert facts["context"] == 64 and facts["new_tokens"] == 32


def test_windows_longer_than_an_encoder_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "squad.jsonl"
    words = " ".join(f"word{n}" for n in range(90))
    rows = [f'{{"context": "{words} {n}", "question": "q {n}?", "answer": "word{n % 90}"}}' for n in range(120)]
    path.write_text("\n".join(rows), encoding="utf-8")
    settings = {**AS_IT_IS, "model": str(tiny_encoder(tmp_path / "encoder"))}
    with pytest.raises(UserError, match=r"max_length: 512 was given, but .* has 64 positions"):
        run(config(path, tmp_path / "run", "answer", budget="4 updates", max_length=512, **settings))


def test_a_batch_of_an_entrant_is_what_tokens_buy() -> None:
    class Train:
        def order(self, batch_size: int, seed: int) -> Train:
            self.size = batch_size
            return self

        def at(self, position: int) -> list[int]:
            return list(range(self.size))

        def tokens(self, rows: list[int]) -> int:
            return 20 * len(rows)

    class Arena:
        train = Train()

    budget = Budget(amount=6400, unit="tokens")
    assert front._updates(budget, 1.0, Arena(), 32) == 10  # pyright: ignore[reportArgumentType]
    assert front._seconds(budget, 2.0, Arena(), 64) == 10  # pyright: ignore[reportArgumentType]
