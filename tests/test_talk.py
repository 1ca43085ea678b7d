"""A conversation on the command line writes as the bundle was tuned, with what is asked for changed, as the server does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import chat_bundle

from multistep.bundle import load_bundle
from multistep.language_bundle import LanguageBundle
from multistep.predictors.decoding import Beam, Decoding, Greedy, Sample, greedy, obeyed
from multistep.serve.language import _obeyed
from multistep.serve.openai import Wanted
from multistep.talk import Talk

LIMITS: dict[str, Any] = {
    "max_new_tokens": 24, "min_new_tokens": 4, "repetition_penalty": 1.5, "no_repeat_ngram": 3, "stop": ("q", "zz"),
}  # fmt: skip
DRAWS: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 4}
TUNED = (Greedy(**LIMITS), Beam(beams=3, **LIMITS), Sample(**DRAWS, **LIMITS))


def bundle(folder: Path, decoding: Decoding) -> LanguageBundle:
    found = load_bundle(chat_bundle(folder, **decoding.model_dump(exclude={"kind"})))
    assert isinstance(found, LanguageBundle)
    return found


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("temperature", [None, 0.0, 0.7])
@pytest.mark.parametrize("tuned", TUNED, ids=lambda d: d.kind)
def test_chat_and_server_obey_alike(
    tuned: Decoding, temperature: float | None, seed: int | None, tmp_path: Path
) -> None:
    served = _obeyed(tuned, Wanted(temperature=temperature, seed=seed), 1000)
    talk = Talk(bundle(tmp_path, tuned), temperature=temperature, seed=seed)
    assert talk._decoding == (greedy(served) if isinstance(served, Beam) else served)
    assert {name: served.model_dump()[name] for name in LIMITS} == LIMITS


def test_what_is_not_asked_for_stays() -> None:
    drawn = TUNED[2]
    assert obeyed(drawn, seed=7) == drawn.with_(seed=7) and obeyed(drawn, top_k=5) == drawn.with_(top_k=5)
    assert obeyed(drawn, temperature=0.5) == drawn.with_(temperature=0.5)
    for tuned in TUNED:
        assert obeyed(tuned) == tuned and obeyed(tuned, temperature=0) == obeyed(tuned, top_p=0) == TUNED[0]
    for tuned in TUNED[:2]:
        assert obeyed(tuned, seed=7) == tuned
        assert obeyed(tuned, temperature=0.5, seed=7) == Sample(temperature=0.5, seed=7, **LIMITS)


def test_another_seed_is_another_answer(tmp_path: Path) -> None:
    loaded = bundle(tmp_path, Sample(temperature=1.0, seed=4, max_new_tokens=40))
    said = ["".join(Talk(loaded, seed=seed).say("Say one")) for seed in (None, 4, 7)]
    assert said[0] == said[1] != said[2]
