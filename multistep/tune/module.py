"""What a run on any module does with a trial: profile, judge, train, average, read the test; states on disk as everywhere.

A module's states hold its parameters and buffers; the first one (as it was given) holds the frozen ones too, so that a run can
be resumed with a module that was made anew.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from multistep import metrics, standing, team
from multistep.allocation import in_halves
from multistep.budget import Budget, Clock
from multistep.controllers.learnt import learnt
from multistep.controllers.module import ModuleProblem
from multistep.diagnosed import Known
from multistep.loader import ModuleRows
from multistep.metrics import Scored
from multistep.objectives import BinaryCrossEntropy, CrossEntropy, Distill, Huber, MeanAbsoluteError, MeanSquaredError
from multistep.objectives.base import BaseObjective
from multistep.precision import mixed
from multistep.schedules import Plateau
from multistep.standing import Stood
from multistep.state import TrainState, read_folder, write_folder
from multistep.strategy import AsGiven, Average, Diagnose, Profile, ReadTest, TrainModule, Trial
from multistep.tasks import Classify, Multilabel, Regress, Task
from multistep.train import train
from multistep.tune.diagnose import advice_of_module, higher_is_better, told
from multistep.tune.segment import Record
from multistep.tune.soup import greedy_soup
from multistep.tune.training import averaged, run_training
from multistep.tune.watch import Acts, Looks, acts_of, checks
from multistep.types import Cost, MetricValue, Outcome, UserError, Verdict

JUDGE_BATCH = 256  # examples at once while judging
PROFILE_UPDATES = 3
MASKED = -1e30  # a module may rule a class out by minus infinity: it is judged as this, which is finite

Run = Generator[Record, None, Outcome]


class Answers(NamedTuple):
    """A state's answers on a split: the loss of every example and, for tasks that metrics know, logits and decisions."""

    losses_N: np.ndarray
    scored: Scored | None


class ModuleWorks:
    """The bench of a run on a module, as `tune` drives it. `rows`: "train", "validation" and perhaps "test"."""

    def __init__(
        self, module: nn.Module, rows: Mapping[str, ModuleRows], problem: ModuleProblem, clock: Clock,
        stop: Callable[[], int], out: Path, task: Task | None, seed: int,
    ):  # fmt: skip
        self.clock, self.stop, self.out, self.task, self.seed = clock, stop, out, task, seed
        self.rows, self.problem = rows, problem
        self.incumbent: str | None = None
        self.micro_batch = 0  # examples at once that fitted into memory when a trial's did not; 0: no limit was met
        self.judge_s = 0.0
        self.past: list[tuple[Trial, Outcome]] = []
        self._module = module
        self._answers: dict[str, Answers] = {}

    def run(self, trial: Trial) -> Run:
        match trial.action:
            case Profile():
                return self._profile(trial)
            case AsGiven():
                return self._as_given(trial)
            case TrainModule() as action:
                return self._train(trial, action)
            case Average(which="soup") as action:
                return self._soup(trial, action)
            case Average() as action:
                return self._average(trial, action)
            case Diagnose():
                return self._diagnose(trial)
            case ReadTest():
                return self._test(trial)
        raise AssertionError(f"{trial.action.kind} is not for modules")

    def apply(self, trial: Trial, outcome: Outcome) -> bool:
        """Take an outcome into the run's standing; whether the incumbent changed. Depends on the outcome alone, so it replays."""
        self.micro_batch = outcome.facts.get("micro_batch", self.micro_batch)
        self.past.append((trial, outcome))
        if isinstance(trial.action, Profile):
            self.judge_s = outcome.facts["judge_s"]
        stood, committed = standing.module(Stood(self.standing(), self.families()), trial, outcome)
        self.incumbent = None if stood.incumbent is None else stood.incumbent["state"]
        return committed

    def ship(self) -> None:
        """The incumbent's weights, as model/model.safetensors."""
        assert self.incumbent is not None
        folder = self.out / "model"
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.module(self.incumbent), str(folder / "model.safetensors.new"))
        (folder / "model.safetensors.new").replace(folder / "model.safetensors")

    def standing(self) -> dict[str, Any] | None:
        return None if self.incumbent is None else {"kind": "module", "state": self.incumbent}

    def families(self) -> dict[str, str]:
        return {} if self.incumbent is None else {"module": self.incumbent}

    # ------------------------------------------------------------------ states

    def module(self, state: str | None) -> nn.Module:
        """A copy of the module with a state's weights; None: as it was given."""
        module = copy.deepcopy(self._module)
        if state is not None:
            self._fill(module, read_folder(self._folder(state))[1])
        return module

    def adopt_given(self) -> None:
        """Take the weights that the run began with into the module, when a state on disk holds them; all of a team take the first one's."""
        for folder in sorted((self.out / "states").glob("*-incumbent")) if team.leads() else ():
            self._fill(self._module, read_folder(folder)[1])
        team.first_tensors([*self._module.parameters(), *self._module.buffers()])

    def _fill(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        values = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(("model.", "buffer."))}
        unknown = module.load_state_dict(values, strict=False).unexpected_keys
        if unknown:
            raise UserError(f"module: the run's states have {unknown[0]!r}, this module has not. Give the same module.")

    def _folder(self, state: str) -> Path:
        return self.out / "states" / state

    # ------------------------------------------------------------------ judging

    def answers(self, state: str) -> Answers:
        """On validation, computed once."""
        if state not in self._answers:
            self._answers[state] = self.judge(self.module(state), self.rows["validation"])
        return self._answers[state]

    def judge(self, module: nn.Module, rows: ModuleRows) -> Answers:
        """The module's answers on these rows. Leaves it in evaluation mode."""
        return judge_rows(module, rows, self.problem.objective, self.task, self.problem.bf16)

    def verdict(self, candidate: Answers, incumbent: Answers, alpha: float) -> Verdict:
        if self.problem.metric == "loss" or self.task is None:
            return metrics.judge_losses(candidate.losses_N, incumbent.losses_N, alpha)
        assert candidate.scored is not None and incumbent.scored is not None
        return metrics.judge(self.problem.metric, self.task, candidate.scored, incumbent.scored, self.seed, alpha)

    def measured(self, answers: Answers) -> dict[str, MetricValue]:
        """The metric that decides, the task's others, and the loss; with standard errors."""
        n = len(answers.losses_N)
        stderr = float(answers.losses_N.std(ddof=1) / n**0.5) if n > 1 else float("nan")
        found = {"loss": MetricValue(float(answers.losses_N.mean()), stderr)}
        if self.task is None or answers.scored is None:
            return found
        wanted = [self.problem.metric] if self.problem.metric != "loss" else []
        names = tuple(dict.fromkeys([*wanted, *self.task.metrics]))
        return {**metrics.measure(names, self.task, answers.scored, seed=self.seed), **found}

    def _decided(self, trial: Trial, facts: Mapping[str, Any], started: float, **spent: int) -> Outcome:
        answers = self.answers(trial.id)
        found = dict(facts)
        if trial.against is not None:
            against = self.verdict(answers, self.answers(trial.against), trial.alpha)
            found |= {"against_verdict": against.model_dump(), "against_rival": trial.against}
        verdict = None
        if trial.commit and self.incumbent is not None:
            verdict = self.verdict(answers, self.answers(self.incumbent), trial.alpha)
        cost = Cost(wall_s=time.monotonic() - started, **spent)
        return Outcome(state=trial.id, metrics=self.measured(answers), verdict=verdict, cost=cost, facts=found)

    # ------------------------------------------------------------------ actions

    def _profile(self, trial: Trial) -> Run:
        """Seconds of an update and of judging validation, on copies; tokens of an update."""
        started = time.monotonic()
        p, rows = self.problem, self.rows["train"]
        first = rows.order(p.batch_size, self.seed).at(0)
        strategy = TrainModule(
            optimizer=p.optimizer.at(1e-12),
            objective=p.objective,
            batch_size=p.batch_size,
            bf16=p.bf16,
            freeze=p.freeze,
        )
        trainable = sum(q.numel() for _, q in strategy.trained(self._module))
        facts: dict[str, Any] = {"rows": dict(p.rows), "parameters": trainable, "tokens_an_update": rows.tokens(first)}
        facts |= {"update_s": 0.0, "judge_s": 0.0, "test_s": 0.0}
        if p.unit == "seconds":
            state = TrainState(copy.deepcopy(self._module))
            state.begin(strategy, Budget(amount=PROFILE_UPDATES, unit="updates"))
            times = [time.monotonic()]
            times += [time.monotonic() for _ in train(state, rows, bf16=p.bf16)]
            facts["update_s"] = min(np.diff(times).tolist(), default=0.0) / team.speed()
            few = self.rows["validation"].subset(range(min(len(self.rows["validation"]), JUDGE_BATCH)))
            self.judge(state.model, few)
            begun = time.monotonic()
            self.judge(state.model, few)
            a_row = (time.monotonic() - begun) / len(few)
            facts |= {"judge_s": a_row * p.rows["validation"], "test_s": a_row * p.rows.get("test", 0)}
        if self.incumbent is not None:  # of a run that is given more
            facts["made_by"] = self._made_by(self.incumbent)
        yield "Noted", {"trial": trial.id, "what": "profiled", "facts": facts}
        return Outcome(facts=facts, cost=Cost(wall_s=time.monotonic() - started))

    def _made_by(self, state: str | None) -> dict[str, Any] | None:
        """The strategy of the training that left a state, at the rate to ask for; None: it is as it was given."""
        found = learnt({trial.id: (trial, outcome) for trial, outcome in self.past}, state)
        return None if found is None else found.again().model_dump(mode="json")

    def _as_given(self, trial: Trial) -> Run:
        started = time.monotonic()
        tensors = {f"model.{n}": v for n, v in self._module.state_dict().items()}
        write_folder(self._folder(trial.id), {"family": "module"}, {k: v.clone() for k, v in tensors.items()})
        yield "Noted", {"trial": trial.id, "what": "optimizer", "facts": {"rule": self.problem.choice}}
        return self._decided(trial, {}, started)

    def _train(self, trial: Trial, action: TrainModule) -> Run:
        started = time.monotonic()
        state = TrainState(self.module(trial.start))
        state.counters.seed = self.seed
        states = self.out / "states"
        plateau = action.schedule if isinstance(action.schedule, Plateau) else None
        acts, said = acts_of(len(self.rows["validation"]), Acts(trial.watch_gap, trial.patience, plateau))
        if said:
            yield "Noted", {"trial": trial.id, "what": "looks", "facts": said}
        facts, spent = yield from run_training(
            trial, action, state, self.rows["train"], self._watch(trial, acts), states, self.clock, self.stop,
            {"family": "module"}, micro_batch=self.micro_batch,
        )  # fmt: skip
        self._answers[trial.id] = self.judge(state.model, self.rows["validation"])
        return self._decided(trial, facts, started, **spent)

    def _watch(self, trial: Trial, acts: Acts) -> Looks | None:
        epochs = self.problem.looks == "epoch" and trial.stage == "trunk"
        if not (any(acts) or epochs):
            return None
        at = checks(trial.share, self.judge_s) if self.problem.unit == "seconds" else checks()
        an_epoch = self.rows["train"].order(self.problem.batch_size, self.seed).per_epoch
        return Looks(
            self.out / "states" / f"{trial.id}.best",
            lambda state: self.judge(state.model, self.rows["validation"]).losses_N,
            at, **acts._asdict(), every=an_epoch if epochs else 0,
        )  # fmt: skip

    def _average(self, trial: Trial, action: Average) -> Run:
        started = time.monotonic()
        assert trial.start is not None
        values = averaged(self.out / "states", trial.start, action.which)
        if values is None:
            return Outcome(ok=False, failure="the segment was too short for a tail", cost=_wall(started))
        write_folder(self._folder(trial.id), {"family": "module", "start": trial.start}, values)
        yield "Noted", {"trial": trial.id, "what": "averaged", "facts": {"which": action.which}}
        return self._decided(trial, {}, started)

    def _soup(self, trial: Trial, action: Average) -> Run:
        started = time.monotonic()
        higher = self.problem.metric != "loss" and metrics.METRICS[self.problem.metric].higher_is_better

        def weights(state: str) -> dict[str, Tensor]:
            tensors = read_folder(self._folder(state))[1]
            return {k: v for k, v in tensors.items() if k.startswith(("model.", "buffer."))}

        def score(values: Mapping[str, Tensor]) -> float:
            module = self.module(None)
            self._fill(module, values)
            value = self.measured(self.judge(module, self.rows["validation"]))[self.problem.metric].value
            return value if higher else -value

        values, taken, tried = greedy_soup(action.members, weights, score)
        yield "Noted", {"trial": trial.id, "what": "averaged", "facts": {"which": "soup", "tried": tried}}
        if len(taken) == 1:
            return Outcome(ok=False, failure=f"nothing improves {taken[0]} in a soup", cost=_wall(started))
        write_folder(self._folder(trial.id), {"family": "module", "start": None}, values)
        return self._decided(trial, {"members": taken}, started)

    def _diagnose(self, trial: Trial) -> Run:
        started, p = time.monotonic(), self.problem
        assert self.incumbent is not None
        value = self.measured(self.answers(self.incumbent))[p.metric]
        known = Known(
            metric=p.metric, value=value, rows=p.rows["validation"],
            advice=advice_of_module(p.optimizer.kind, str(Budget(amount=2 * self.clock.budget.amount, unit=p.unit))),
            higher_is_better=higher_is_better(p.metric), seed=self.seed, halved=False,
            served=Stood(self.standing(), self.families()).states(),
        )  # fmt: skip
        said, outcome = told(trial, self.past, known, {}, started)
        yield from said
        return outcome

    def _test(self, trial: Trial) -> Run:
        started = time.monotonic()
        found = self.measured(self.judge(self.module(self.incumbent), self.rows["test"]))
        yield "TestRead", {"trial": trial.id, "rows": len(self.rows["test"]), "metrics": found}
        return Outcome(metrics=found, cost=_wall(started))


@torch.no_grad()
def judge_rows(module: nn.Module, rows: ModuleRows, objective: BaseObjective, task: Task | None, bf16: bool) -> Answers:
    """A module's answers on these rows. Leaves it in evaluation mode."""
    module.eval()
    losses: list[np.ndarray] = []
    logits: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    device = next(iter(module.parameters())).device.type

    def one(part: np.ndarray) -> None:
        inputs, wanted = rows.load(part)
        with mixed(bf16, device):
            found = rows.outputs(module, inputs).float()
        each_N = objective.each(found, wanted).float().cpu().numpy()
        if task is not None:
            scores = _logits(task, found)
            logits.append((scores.clamp_min(MASKED) if task.kind == "classify" else scores).cpu().numpy())
            targets.append(objective.labels(wanted).cpu().numpy())
        losses.append(each_N)  # last: a part that does not fit comes again in halves

    for part in rows.parts(JUDGE_BATCH):
        in_halves(part, one)
    losses_N = np.concatenate(losses).astype(np.float64)
    if task is None:
        return Answers(losses_N, None)
    logits_NK, targets_N = np.concatenate(logits).astype(np.float64), _targets(task, np.concatenate(targets))
    return Answers(losses_N, Scored(targets_N, logits_NK, task.decide(logits_NK)))


# ---------------------------------------------------------------------------------------------- tasks


def task_of(objective: BaseObjective, outputs: Tensor) -> Task | None:
    """The task whose metrics fit an objective and its outputs; None where only the loss can be compared."""
    core, flat = objective.core(), outputs.ndim == 1 or outputs.shape[1:] == (1,)
    if isinstance(core, CrossEntropy | Distill) and outputs.ndim == 2 and outputs.shape[1] > 1:
        return Classify(labels=tuple(str(k) for k in range(outputs.shape[1])))
    if isinstance(core, BinaryCrossEntropy) and flat:
        return Classify(labels=("0", "1"))
    if isinstance(core, BinaryCrossEntropy) and outputs.ndim == 2:
        return Multilabel(labels=tuple(str(k) for k in range(outputs.shape[1])))
    if isinstance(core, MeanSquaredError | MeanAbsoluteError | Huber) and flat:
        return Regress()
    return None


def _logits(task: Task, outputs: Tensor) -> Tensor:
    """Outputs as the task's logits [N,K]: one output of two classes becomes two."""
    outputs = outputs[:, None] if outputs.ndim == 1 else outputs
    if task.kind == "classify" and outputs.shape[1] == 1:
        return torch.cat([-outputs / 2, outputs / 2], dim=1)
    return outputs


def _targets(task: Task, targets: np.ndarray) -> np.ndarray:
    flat = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets
    match task.kind:
        case "classify":
            return flat.astype(np.int64)
        case "multilabel":
            return flat.astype(bool)
        case "regress":
            return flat.astype(np.float64)


def _wall(started: float) -> Cost:
    return Cost(wall_s=time.monotonic() - started)
