"""Search over ways to write with Optuna's tree-structured Parzen estimator: what next, from what quality and latency came of the last.

Two objectives, quality up and milliseconds down. Deterministic given its seed and what it was told; it holds no clock and no file.
Sources: Bergstra et al. 2011 (TPE); Ozaki et al. 2022 (with several objectives); Akiba et al. 2019, arXiv 1907.10902 (Optuna).
No torch here.
"""

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
_DRAWN_AT_RANDOM = 4  # of the asks, before the estimator has anything to go by


class Space(Spec):
    """What is searched. `base`: the limits that every way keeps (new tokens, stop texts). `examples`: there are for prompts."""

    families: tuple[Family, ...]
    base: Decoding
    utility: Utility | None
    numbers: bool
    examples: int = 0


class WaySearch:
    """`ask` gives a way, `tell` takes in what came of it; one after the other."""

    def __init__(self, space: Space, seed: int):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_DRAWN_AT_RANDOM)
        self._space = space
        self._study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        self._trial: Any = None
        self._worst = 0.0

    def ask(self) -> Way:
        self._trial = self._study.ask()
        return suggested(self._trial, self._space)

    def tell(self, quality: float | None, ms: float) -> None:
        """`quality`: higher is better; None where it was not measured: then as bad as the worst so far."""
        self._worst = min(self._worst, quality) if quality is not None else self._worst
        self._study.tell(self._trial, [self._worst if quality is None else quality, ms])

    def pass_over(self) -> None:
        """What was asked for is known already."""
        import optuna

        self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)


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
