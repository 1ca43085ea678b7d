"""Every controller against `random`, on recorded learning curves (curves.py), over 200 replays.

A replay draws a dataset, a seed, how far the prior learning rate is off (a factor of up to four each way) and the validation rows (a
bootstrap sample); then each controller spends the same budget of updates by looking its trials up in the table. It is judged on the
test rows of what it committed, paired by replay with what `random` got; `random` at twice the budget is there too.

What a table cannot say is stated: a setting is looked up at its nearest neighbour (in log rate, log decay, smoothing), a fork with
another setting stands at that setting's curve after as many updates, batch sizes and averages are not in it.
"""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from _common import Results, Row, markdown, parser, select
from curves import COOL, DATASETS, FOLDER, MARKS, STRETCH
from multistep.controllers.module import MODULE_CONTROLLERS, ModuleProblem
from multistep.controllers.script import Scripted, Skip, Wait
from multistep.metrics.verdicts import better, mcnemar_p, paired_t
from multistep.schedules import Constant
from multistep.strategy import AsGiven, Diagnose, Profile, TrainModule, Trial
from multistep.types import Comparison, Cost, MetricValue, Outcome, Verdict

BENCH = "replays"
REPLAYS = 200
BUDGETS = (1000, 3000)  # updates: two and six trainings of full length
OFF = 4.0  # the prior's rate is off by a factor of up to so much


class Table(NamedTuple):
    """The curves of one dataset: who is right [S,T,N] on control and test, the training losses [S,T], the settings [S,3]."""

    control: np.ndarray
    test: np.ndarray
    losses: np.ndarray
    settings: np.ndarray

    @property
    def best(self) -> float:
        """What a seer would have got."""
        return float(self.test.mean(-1).max())


def read(dataset: str) -> Table:
    with np.load(FOLDER / f"{dataset}.npz", allow_pickle=False) as found:
        control, test = (
            np.unpackbits(found[s], axis=-1)[..., :n].astype(bool)
            for s, n in zip(("control", "test"), found["sizes"], strict=True)
        )
        return Table(control, test, found["losses"], found["settings"])


class Place(NamedTuple):
    """Where a training stands: setting, updates, and whether its rate has decayed there."""

    setting: int
    updates: float
    decayed: bool


class Machine:
    """Runs trials by looking them up, and judges them as a run does. `rows`: the control rows of this replay."""

    def __init__(self, table: Table, rows: np.ndarray, off: float, budget: float):
        self.table, self.rows, self.off, self.remaining = table, rows, off, budget
        self.places: dict[str, Place] = {}
        self.incumbent: str | None = None
        x_S3 = table.settings
        self._where_S3 = np.stack([np.log(x_S3[:, 0]), 0.3 * np.log(x_S3[:, 1]), 5 * x_S3[:, 2]], axis=1)

    def nearest(self, action: TrainModule) -> int:
        rate, decay = action.optimizer.lr * self.off, max(1e-4, float(dict(action.optimizer).get("weight_decay", 0.0)))
        smoothing = float(dict(action.objective).get("label_smoothing", 0.0))
        here_3 = np.array([np.log(rate), 0.3 * np.log(decay), 5 * smoothing])
        return int(np.argmin(((self._where_S3 - here_3) ** 2).sum(1)))

    def right(self, state: str, split: str) -> np.ndarray:
        """Who is right after a cool-down there: nothing else is ever compared."""
        assert self.places[state].decayed, f"{state} has not decayed"
        place = self.places[state]
        mark = _mark(place)
        if split == "test":
            return self.table.test[place.setting, mark]
        return self.table.control[place.setting, mark][self.rows]

    def run(self, trial: Trial) -> Outcome:
        match trial.action:
            case Profile():
                facts = {"update_s": 0.0, "judge_s": 0.0, "test_s": 0.0, "tokens_an_update": 1, "parameters": 1}
                return Outcome(facts=facts, remaining=self.remaining)
            case AsGiven():
                self.places[trial.id] = Place(-1, 0, True)
            case TrainModule() as action:
                self._train(trial, action)
            case Diagnose():
                return Outcome(remaining=self.remaining)
            case _:
                return Outcome(ok=False, failure="not in the table", remaining=self.remaining)
        return self._judged(trial)

    def _train(self, trial: Trial, action: TrainModule) -> None:
        self.remaining = max(0.0, self.remaining - trial.share)
        before = self.places[trial.start].updates if trial.start else 0.0
        setting, stays = self.nearest(action), isinstance(action.schedule, Constant)
        if stays:
            after = before + trial.share
        elif trial.start:  # a branch: marks hold what its cool-down brought
            after = before + max(0.0, trial.share - COOL * before)
        else:  # one training that decays all along is a trunk with its cool-down
            after = trial.share / (1 + COOL)
        self.places[trial.id] = Place(setting, after, not stays)

    def _judged(self, trial: Trial) -> Outcome:
        place = self.places[trial.id]
        if place.setting < 0:
            self.incumbent = trial.id
            return Outcome(state=trial.id, metrics={"accuracy": MetricValue(0.0, 0.0)}, remaining=self.remaining)
        loss = float(self.table.losses[place.setting, _mark(place)])
        if not np.isfinite(loss):
            return Outcome(ok=False, failure="diverged", remaining=self.remaining)
        if not place.decayed:
            return Outcome(state=trial.id, facts={"train_loss": loss}, remaining=self.remaining)
        mine_N = self.right(trial.id, "control")
        facts: dict[str, Any] = {"train_loss": loss}
        if trial.against is not None:
            facts["against_verdict"] = verdict(mine_N, self.right(trial.against, "control"), trial.alpha).model_dump()
        decided = None
        if trial.commit and self.incumbent is not None:
            stands = self.places[self.incumbent].setting >= 0
            theirs_N = self.right(self.incumbent, "control") if stands else np.zeros_like(mine_N)
            decided = verdict(mine_N, theirs_N, trial.alpha)
            if decided.accept:
                self.incumbent = trial.id
        value = MetricValue(float(mine_N.mean()), float(mine_N.std() / len(mine_N) ** 0.5))
        return Outcome(
            state=trial.id, metrics={"accuracy": value}, verdict=decided, facts=facts, remaining=self.remaining,
            cost=Cost(updates=round(trial.share)),
        )  # fmt: skip


def _mark(place: Place) -> int:
    return min(MARKS - 1, max(0, round(place.updates / STRETCH) - 1))


def verdict(mine_N: np.ndarray, theirs_N: np.ndarray, alpha: float) -> Verdict:
    """As a run decides: McNemar's exact test."""
    gain_N = mine_N.astype(float) - theirs_N.astype(float)
    wins, losses, n = int((gain_N > 0).sum()), int((gain_N < 0).sum()), len(gain_N)
    compared = Comparison(
        metric="accuracy", candidate=float(mine_N.mean()), incumbent=float(theirs_N.mean()), difference=float(gain_N.mean()),
        stderr=float(gain_N.std(ddof=1) / n**0.5), p=mcnemar_p(wins, losses), n=n, test="mcnemar", wins=wins, losses=losses,
    )  # fmt: skip
    return better((compared,), alpha)


def replay(controller: str, table: Table, budget: float, number: int) -> Row:
    """One controller on one draw: the test score of what stands at the end, what it spent, how many trials it took."""
    draw = np.random.default_rng(number)
    rows = draw.integers(0, table.control.shape[-1], table.control.shape[-1])
    off = OFF ** draw.uniform(-1, 1)
    problem = ModuleProblem.parse({
        "objective": {"kind": "cross_entropy"}, "metric": "accuracy", "optimizer": {"kind": "adamw"}, "regime": "scratch", "schedule": None,
        "batch_size": 32, "micro_batch": 0, "clip": 1.0, "dropout": None, "bf16": False, "budget": budget, "unit": "updates",
        "rows": {"train": 6000, "validation": len(rows)}, "choice": "a table", "seed": number, "own_batches": True,
        "higher_is_better": True,
    })  # fmt: skip
    machine, asked, waiting = Machine(table, rows, off, budget), 0, []
    script = Scripted(MODULE_CONTROLLERS[controller](problem))
    order = random.Random(number)
    while (ask := script.ask()) is not None or waiting:
        if isinstance(ask, Trial):
            waiting.append(ask)
        elif ask is None or isinstance(ask, Wait):  # workers come back in any order
            trial = waiting.pop(order.randrange(len(waiting)))
            script.tell(trial, machine.run(trial))
            asked += isinstance(trial.action, TrainModule)
        else:
            assert isinstance(ask, Skip), ask
    assert machine.incumbent is not None
    stands = machine.places[machine.incumbent]
    score = float(machine.right(machine.incumbent, "test").mean()) if stands.setting >= 0 else 0.0
    return {"score": score, "regret": table.best - score, "spent": budget - machine.remaining, "trials": asked}


def run(controller: str, budget: float, count: int) -> Row:
    """All replays of one controller; regret is in points of accuracy against the best of the table."""
    tables = [read(name) for name in DATASETS]
    found = [replay(controller, tables[n % len(tables)], budget, n) for n in range(count)]
    return {"ok": True, "regret": [round(100 * f["regret"], 3) for f in found],
            "spent": statistics.fmean(f["spent"] for f in found), "trials": statistics.fmean(f["trials"] for f in found)}  # fmt: skip


def table(rows: list[Row]) -> str:
    head = [
        "updates",
        "controller",
        "regret, points",
        "gain over random ± 95 %",
        "wins : losses",
        "p",
        "trials",
        "updates spent",
    ]
    body = []
    for budget in sorted({r["budget"] for r in rows}, key=int):
        random_row = next((r for r in select(rows, budget=budget) if r["system"] == "random"), None)
        for row in sorted(select(rows, budget=budget), key=lambda r: statistics.fmean(r["regret"])):
            mine = np.array(row["regret"])
            line = [budget, row["system"], f"{mine.mean():.2f} ± {1.96 * mine.std(ddof=1) / len(mine) ** 0.5:.2f}"]
            if random_row is None or row is random_row:
                body.append([*line, "-", "-", "-", f"{row['trials']:.1f}", f"{row['spent']:.0f}"])
                continue
            gain = np.array(random_row["regret"]) - mine
            stderr = gain.std(ddof=1) / len(gain) ** 0.5
            p = paired_t(float(abs(gain.mean())), float(stderr), len(gain))
            line += [
                f"{gain.mean():+.2f} ± {1.96 * stderr:.2f}",
                f"{(gain > 0).sum()} : {(gain < 0).sum()}",
                f"{p:.2g}",
            ]
            body.append([*line, f"{row['trials']:.1f}", f"{row['spent']:.0f}"])
    return markdown(head, body) + "\n\nRegret: of the best setting's accuracy on test. p: one-sided, paired by replay."


def main() -> None:
    options = parser(__doc__, seeds=(0,))
    options.add_argument("--replays", type=int, default=REPLAYS)
    options.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="updates")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    if not all((FOLDER / f"{name}.npz").exists() for name in DATASETS):
        raise SystemExit(f"{Path('benchmarks/curves')}: no curves there. Record them: python benchmarks/curves.py")
    for budget in given.budgets:
        for name in [*MODULE_CONTROLLERS, "random x2"]:
            if not results.has("table", str(budget), name, 0):
                controller, _, twice = name.partition(" ")
                found = run(controller, budget * (2 if twice else 1), given.replays)
                results.add("table", str(budget), name, 0, found, 0.0)


if __name__ == "__main__":
    main()
