"""A peer of course.py: the Trainer with Optuna's search over learning rate, epochs, batch and weight decay, and a refit of the best.

TPE, pruned by the median of earlier trials at half of a trial. A trial has a twelfth of the minutes, so that several fit in the first
half of them; the rest is one training with the best settings. The first trial is the settings that a user would have taken unsearched
(enqueued). `epochs` divides what is trained on: in a fixed time, more passes are fewer rows. peer_asha.py has the same space and shares.
"""

from __future__ import annotations

from typing import Any

import optuna

from _peers import Fitted, Given
from peer_encoder import Encoded, Kit, Settings, accuracy, fine_tune, predictor, prepare

SEARCH, TRIAL = 0.5, 1 / 12  # shares of the minutes
LR, EPOCHS, BATCHES, DECAY = (2e-5, 1e-3), (1, 2, 3, 5), (8, 16, 32, 64), (1e-3, 0.3)
END_S = 1.0  # of the minutes, for what the Trainer does after its last update
FIRST = {"lr": 2e-4, "epochs": 2, "batch": 32, "weight_decay": 0.01}
_LOOKS = (0.5, 1.0)
_JUDGED = 0.3  # rows of validation a look, as a share of those a trial could train on: forward passes cost a third


def settings(found: dict[str, Any]) -> Settings:
    return Settings(found["lr"], found["batch"], found["weight_decay"], found["epochs"])


def judged(kit: Kit, trial_s: float) -> Encoded:
    """The validation rows that a look of a trial is worth."""
    return kit.rows_v.first(max(50, int(_JUDGED / len(_LOOKS) * kit.rows_s * trial_s)))


def tpe(given: Given) -> Fitted:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kit = prepare(given)
    clock, trial_s = given.clock, TRIAL * given.clock.limit_s
    rows_v = judged(kit, trial_s)
    sampler = optuna.samplers.TPESampler(seed=given.seed, n_startup_trials=4)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.enqueue_trial(FIRST)
    while clock.used_s + trial_s < SEARCH * clock.limit_s or not study.trials:
        _one(study, kit, rows_v, trial_s, given.seed)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    best = study.best_params if done else FIRST
    model, updates = fine_tune(kit, settings(best), clock.left_s - END_S, given.seed)
    facts = {**kit.facts(), "best": best, "trials": len(study.trials), "complete": len(done), "updates": updates}
    return Fitted(
        predictor(model, kit), {**facts, "judged_on": len(rows_v), "found": study.best_value if done else None}
    )


def _one(study: optuna.Study, kit: Kit, rows_v: Encoded, trial_s: float, seed: int) -> None:
    trial = study.ask()
    found = {
        "lr": trial.suggest_float("lr", *LR, log=True), "epochs": trial.suggest_categorical("epochs", EPOCHS),
        "batch": trial.suggest_categorical("batch", BATCHES),
        "weight_decay": trial.suggest_float("weight_decay", *DECAY, log=True),
    }  # fmt: skip
    pruned = False

    def look(model: Any, which: int) -> bool:
        nonlocal pruned
        trial.report(accuracy(model, kit, rows_v), which)
        pruned = trial.should_prune()
        return not pruned

    model, _ = fine_tune(kit, settings(found), trial_s, seed, _LOOKS[:1], look)
    if pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, accuracy(model, kit, rows_v))
