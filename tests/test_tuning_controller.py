"""The script that tunes writing, on a machine of paper: what it asks, what it skips, and that it replays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from multistep.controllers import decoding
from multistep.controllers.choices import CHOOSERS, MOST, Proposals
from multistep.controllers.decoding import SEARCHED, DecodingProblem, ladder, tuning
from multistep.controllers.script import Scripted, Skip
from multistep.controllers.ways import Space, suggested
from multistep.predictors.decoding import Beam, Greedy
from multistep.predictors.ways import plain, texts, words
from multistep.strategy import Profile, Trial, TryWay
from multistep.tasks.writing import Writing
from multistep.types import Comparison, Cost, MetricValue, Outcome, Verdict


def problem(**more: Any) -> DecodingProblem:
    settings: dict[str, Any] = {
        "task": Writing(kind="translate"), "metric": "bleu", "default": Greedy(max_new_tokens=20), "prompts": False,
        "examples": 0, "limit": None, "budget": 1000.0, "seed": 3, **more,
    }  # fmt: skip
    return DecodingProblem(**settings)


def drive(p: DecodingProblem, second_s: float = 1.0, judged: int = 100) -> tuple[list[Trial], list[Skip]]:
    """Every text costs a second and makes BLEU better by the logarithm of their number; more than 8 are refused."""
    controller, trials, skips, left = Scripted(tuning(p)), [], [], p.budget
    while (ask := controller.ask()) is not None:
        if not isinstance(ask, Trial):
            assert isinstance(ask, Skip)
            skips.append(ask)
            continue
        trials.append(ask)
        way = p.default if isinstance(ask.action, Profile) else ask.action.way  # pyright: ignore[reportAttributeAccessIssue]
        cost, facts = second_s * texts(way), {"ms": 10.0 * texts(way), "judged": judged}
        left -= cost
        metrics = {p.metric: MetricValue(30 + texts(way) / 10, 0.1)}
        compared = Comparison(metric=p.metric, candidate=30, incumbent=30, difference=0.1, stderr=0.1, p=0.2, n=100)
        verdict = Verdict(accept=False, rule="no", evidence=(compared,))
        standing = {"decoding": p.default.model_dump(mode="json")}
        if texts(way) > 8:
            facts, metrics = {**facts, "refused": words(way)}, {}
        controller.tell(
            ask,
            Outcome(
                metrics=metrics,
                verdict=verdict,
                facts=facts,
                cost=Cost(wall_s=cost),
                remaining=max(0.0, left),
                incumbent=standing,
            ),
        )
    return trials, skips


def test_the_ladder_comes_first_then_the_sampler_and_nothing_twice() -> None:
    trials, skips = drive(problem())
    assert not skips and [t.stage for t in trials[:2]] == ["measure", "ladder"]
    tried = [words(t.action.way) for t in trials if isinstance(t.action, TryWay)]
    assert len(set(tried)) == len(tried) and words(Greedy(max_new_tokens=20)) not in tried
    assert sum(t.stage == "search" for t in trials) == SEARCHED
    penalised = [t.action.way for t in trials if isinstance(t.action, TryWay) and t.stage == "ladder"][-2:]
    assert [(w.beams, w.length_penalty) for w in penalised if isinstance(w, Beam)] == [
        (8, 0.6),
        (8, 1.4),
    ]  # the best width


def test_every_look_that_finds_nothing_makes_the_next_one_harder() -> None:
    trials, _ = drive(problem())
    levels = [t.alpha for t in trials if isinstance(t.action, TryWay)]
    assert levels[0] == 0.1 and all(a >= b for a, b in pairwise(levels)) and levels[-1] < 0.05


@pytest.mark.parametrize("controller", CHOOSERS)
def test_every_controller_searches_ways_to_write(controller: str) -> None:
    p = problem(controller=controller)
    trials, skips = drive(p)
    tried = [(words(t.action.way), t.action.share) for t in trials if isinstance(t.action, TryWay)]
    assert len(set(tried)) == len(tried) and trials == drive(p)[0], "nothing twice, and the same again"
    if controller == "fixed":
        assert not tried
    elif controller == "race":
        assert [w for w, _ in tried] == [words(w) for w, _ in ladder(p) if w != p.default], "greedy stands"
    else:
        assert 3 <= len(tried) <= MOST + 2
    looked = [t for t in trials if isinstance(t.action, TryWay) and t.action.share < 1]
    assert bool(looked) == (controller == "halving")
    if controller == "halving":
        shares = [t.action.share for t in trials if isinstance(t.action, TryWay)]
        assert (
            shares == sorted(shares)
            and shares[-1] == 1.0
            and shares.count(0.25) > shares.count(0.5) > shares.count(1.0)
        )
    if controller in ("reactive", "population"):
        assert any(
            isinstance(t.action.way, Beam) and t.action.way.beams == 2 for t in trials if isinstance(t.action, TryWay)
        )
    assert not skips


@pytest.mark.parametrize("controller", sorted(set(CHOOSERS) - {"fixed", "reactive"}))  # which has few neighbours here
def test_no_search_begins_what_it_cannot_pay(controller: str) -> None:
    trials, skips = drive(problem(controller=controller, budget=30.0), second_s=2.0)
    assert skips and sum(2.0 * texts(t.action.way) for t in trials if isinstance(t.action, TryWay)) <= 60


@pytest.mark.parametrize("controller", ["staged", *CHOOSERS])
def test_few_records_decide_nothing(controller: str) -> None:
    trials, skips = drive(problem(controller=controller), judged=20)
    assert [type(t.action) for t in trials] == [Profile]
    assert [s.why for s in skips] == ["all: 20 records are too few to decide on (< 21)"]
    assert not drive(problem(controller=controller), judged=21)[1]


def test_it_replays() -> None:
    for p in (
        problem(),
        problem(metric="numbers", task=Writing(kind="answer", answers="number"), prompts=True, examples=9),
    ):
        assert drive(p) == drive(p)
    assert drive(problem()) != drive(problem(seed=4))


def test_what_the_rest_of_the_budget_cannot_pay_is_skipped_and_cheaper_ones_go_on() -> None:
    trials, skips = drive(problem(budget=12.0))
    assert skips and all("s are left" in s.why for s in skips)
    spent = sum(texts(t.action.way) for t in trials if isinstance(t.action, TryWay)) + 1
    assert spent <= 12.0
    assert not [t for t in drive(problem(budget=1.5))[0] if isinstance(t.action, TryWay)]


def test_each_task_gets_what_it_can_use() -> None:
    def kinds(**more: Any) -> set[str]:
        return {way.kind for way, _ in ladder(problem(**more))}

    assert kinds() == {"greedy", "beam", "mbr", "best_of"}
    chat = kinds(task=Writing(kind="chat"), metric="chrf", prompts=True, examples=100)
    assert chat == {"greedy", "beam", "mbr", "best_of", "few_shot", "draft_revise"}
    assert kinds(task=Writing(kind="answer", answers="number"), metric="numbers") == {
        "greedy",
        "beam",
        "vote",
        "best_of",
    }
    votes = [
        w
        for w, _ in ladder(problem(task=Writing(kind="answer", answers="number"), metric="numbers"))
        if w.kind == "vote"
    ]
    assert votes[0].reads == "number"
    grounded = [w for w, _ in ladder(problem(task=Writing(kind="summarize"), metric="rouge2")) if w.kind == "best_of"]
    assert grounded[0].scorer == "grounded"
    assert all(plain(w).max_new_tokens == 20 for w, _ in ladder(problem()))


def test_the_sampler_finds_the_better_side_and_is_the_same_again() -> None:
    space = Space(
        families=("beam", "mbr", "few_shot", "draw", "best_of"), base=Greedy(max_new_tokens=9, stop=("\n",)), utility="chrf",
        numbers=False, examples=4,
    )  # fmt: skip

    def asked(seed: int) -> list[Any]:
        search, found = Proposals(lambda trial: suggested(trial, space), seed), []
        for _ in range(60):
            way = search.ask()
            found.append(way)
            search.tell(10.0 if isinstance(way, Beam) else None if way.kind == "mbr" else 1.0, 5.0)
        return found

    once = asked(0)
    assert once == asked(0) != asked(1)
    assert all(plain(w).max_new_tokens == 9 and plain(w).stop == ("\n",) for w in once)
    last = [w.kind for w in once[-20:]]
    assert last.count("beam") >= 10, last
    search = Proposals(lambda trial: suggested(trial, space), 0)
    assert search.ask() == once[0]
    search.pass_over()
    assert search.ask() is not None


def test_what_was_refused_is_as_bad_as_the_worst_that_was_measured() -> None:
    """Merits may be below zero: of a loss, of a cost."""
    import optuna

    search = Proposals(lambda trial: trial.suggest_float("x", 0, 1), 0)
    for merit in (None, -0.7, None, -0.9, None):
        search.ask()
        search.tell(merit, 1.0)
    told = [t.values for t in search._study.get_trials(states=[optuna.trial.TrialState.COMPLETE])]
    assert told == [[-0.7, 1.0], [-0.7, 1.0], [-0.9, 1.0], [-0.9, 1.0]]


def test_no_controller_of_writing_needs_torch() -> None:
    import ast
    from pathlib import Path

    from multistep.controllers import choices, ways

    for module in (decoding, ways, choices):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert not [n for n in names if n.split(".")[0] in ("torch", "transformers")]


@pytest.mark.parametrize("asks", [1, 3])
def test_known_ways_are_passed_over(monkeypatch: pytest.MonkeyPatch, asks: int) -> None:
    monkeypatch.setattr(Proposals, "ask", lambda self: Greedy(max_new_tokens=20))
    monkeypatch.setattr(Proposals, "pass_over", lambda self: None)
    monkeypatch.setattr(decoding, "AGAIN", asks)
    trials, _ = drive(problem())
    assert not [t for t in trials if t.stage == "search"]
