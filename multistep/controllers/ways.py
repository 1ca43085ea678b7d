"""The space of ways to write: any of them from the numbers that a trial of Optuna draws, and what lies beside one. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from multistep.predictors.best_of import BestOf
from multistep.predictors.decoding import Beam, Decoding, Greedy, Sample
from multistep.predictors.few_shot import FewShot
from multistep.predictors.mbr import Mbr, Utility
from multistep.predictors.vote import Vote
from multistep.predictors.ways import Way
from multistep.types import Spec

Family = Literal["beam", "draw", "mbr", "best_of", "vote", "few_shot"]


class Space(Spec):
    """What is searched. `base`: the limits that every way keeps (new tokens, stop texts). `examples`: there are for prompts."""

    families: tuple[Family, ...]
    base: Decoding
    utility: Utility | None
    numbers: bool
    examples: int = 0


def suggested(trial: Any, space: Space) -> Way:
    """A way of this space. `trial`: of Optuna; it draws the numbers."""
    family = _one_of(trial, "family", space.families)
    match family:
        case "beam":
            penalty = trial.suggest_float("length_penalty", 0.0, 2.0, step=0.1)
            limits = _limits(trial, space.base)
            return Beam(beams=trial.suggest_int("beams", 2, 12), length_penalty=round(penalty, 1), **limits)
        case "draw":
            return _draw(trial, space.base)
        case "few_shot":
            return FewShot(
                inner=Greedy(**_limits(trial, space.base)), k=trial.suggest_int("k", 1, min(8, space.examples)),
                choose=_one_of(trial, "choose", ("nearest", "seed")), template=_one_of(trial, "template", ("turns", "text")),
                keep=_one_of(trial, "keep", (0, 64, 128)),
            )  # fmt: skip
    inner, n = _draw(trial, space.base), trial.suggest_int("n", 4, 32, step=4)
    match family:
        case "mbr":
            assert space.utility is not None
            return Mbr(inner=inner, n=n, utility=space.utility)
        case "vote":
            return Vote(inner=inner, n=n, reads="number" if space.numbers else "text")
        case _:
            return BestOf(inner=inner, n=n, length_penalty=round(trial.suggest_float("alpha", 0.0, 2.0, step=0.2), 1))


def _draw(trial: Any, base: Decoding) -> Sample:
    return Sample(
        temperature=round(trial.suggest_float("temperature", 0.2, 1.2, step=0.1), 1),
        top_p=round(trial.suggest_float("top_p", 0.6, 1.0, step=0.05), 2), top_k=_one_of(trial, "top_k", (0, 20, 50)),
        min_p=round(trial.suggest_float("min_p", 0.0, 0.2, step=0.02), 2), **_limits(trial, base),
    )  # fmt: skip


def _limits(trial: Any, base: Decoding) -> dict[str, Any]:
    """The base's limits, and penalties of repetition."""
    return {
        **limits_of(base), "repetition_penalty": _one_of(trial, "repetition", (1.0, 1.05, 1.1, 1.2)),
        "no_repeat_ngram": _one_of(trial, "no_repeat_ngram", (0, 3, 4)),
    }  # fmt: skip


def limits_of(base: Decoding) -> dict[str, Any]:
    return {"max_new_tokens": base.max_new_tokens, "min_new_tokens": base.min_new_tokens, "stop": base.stop}


def _one_of(trial: Any, name: str, values: Sequence[Any]) -> Any:
    return trial.suggest_categorical(name, list(values))


def neighbours(way: Way, space: Space) -> list[Way]:
    """Ways that differ in one number, inside of what is searched; and what wraps or replaces a plain one."""
    match way:
        case Greedy():
            draws = Sample(temperature=0.7, **limits_of(way))
            return [Beam(beams=2, **limits_of(way)), *_wrapped(draws, space, 4)]
        case Beam():
            widths = [
                Greedy(**limits_of(way)) if n < 2 else way.with_(beams=n)
                for n in (way.beams // 2, 2 * way.beams)
                if n <= 16
            ]
            return [
                *widths,
                *(
                    way.with_(length_penalty=round(way.length_penalty + d, 1))
                    for d in (-0.4, 0.4)
                    if way.length_penalty + d >= 0
                ),
            ]
        case Sample():
            return _cooler_warmer(way)
        case Mbr(inner=Beam()):
            return [way.inner]
        case Mbr() | BestOf() | Vote():
            sizes = [way.with_(n=n) for n in (way.n // 2, 2 * way.n) if 2 <= n <= 64]
            return [*sizes, *(way.with_(inner=inner) for inner in _cooler_warmer(way.inner))]
        case FewShot():
            counts = [way.with_(k=k) for k in (way.k - 1, way.k + 1) if 1 <= k <= space.examples]
            other = "text" if way.template == "turns" else "turns"
            return [*counts, way.with_(template=other), way.inner]
        case _:
            return []


def _cooler_warmer(way: Any) -> list[Any]:
    return [way.with_(temperature=t) for d in (-0.2, 0.2) if 0 < (t := round(way.temperature + d, 1)) <= 1.5]


def _wrapped(draws: Sample, space: Space, n: int) -> list[Way]:
    found: list[Way] = []
    if "mbr" in space.families and space.utility is not None:
        found.append(Mbr(inner=draws, n=n, utility=space.utility))
    if "vote" in space.families:
        found.append(Vote(inner=draws, n=n, reads="number" if space.numbers else "text"))
    return [*found, BestOf(inner=draws, n=n)]
