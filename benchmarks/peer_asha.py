"""A peer of course.py: the Trainer under Ray Tune's ASHA, in the space and the shares of peer_search.py, and a refit of the best.

Two trials at once, one core each. A trial reports at a third of its time and at its end; ASHA ends two of three at the first. Kind to
the peer: Ray is started before the clock is, and an empty search, whose two workers import torch and transformers, is timed there; what
it took is given back to the real one, whose workers are new processes that import again.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from typing import Any

from _peers import Fitted, Given
from peer_encoder import Encoded, Kit, accuracy, fine_tune, predictor, prepare
from peer_search import BATCHES, DECAY, END_S, EPOCHS, FIRST, LR, SEARCH, settings

TRIAL = 1 / 6  # of the minutes: two run at once, each at about half of the speed
_AT_ONCE = 2
_LOOKS = (1 / 3, 1.0)


def start() -> float:
    """Start Ray on this machine. Seconds that a search takes which does nothing but import."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray import tune  # pyright: ignore[reportMissingImports]

    os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - so Ray spells it; else whatever runs beside them goes first
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # no files of every trial
    ray.init(num_cpus=_AT_ONCE, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        tune.Tuner(
            tune.with_resources(_nothing, {"cpu": 1}),
            tune_config=tune.TuneConfig(num_samples=_AT_ONCE, reuse_actors=True),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    return time.monotonic() - begun


def _nothing(config: dict[str, Any]) -> dict[str, float]:
    import peer_encoder

    return {"accuracy": float(peer_encoder.LONGEST)}


def _trial(config: dict[str, Any], kit: Kit, rows_v: Encoded, trial_s: float, seed: int) -> None:
    import torch
    from ray import tune  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)

    def look(model: Any, which: int) -> bool:
        tune.report({"accuracy": accuracy(model, kit, rows_v)})  # ASHA ends the trial in here
        return True

    model, _ = fine_tune(kit, settings(config), trial_s, seed, _LOOKS[:1], look)
    tune.report({"accuracy": accuracy(model, kit, rows_v)})


def asha(given: Given, empty_s: float) -> Fitted:
    """`empty_s`: what `start` found, given back."""
    from ray import tune  # pyright: ignore[reportMissingImports]
    from ray.tune.schedulers import ASHAScheduler  # pyright: ignore[reportMissingImports]
    from ray.tune.search.basic_variant import BasicVariantGenerator  # pyright: ignore[reportMissingImports]

    kit = prepare(given)
    clock, trial_s = given.clock, TRIAL * given.clock.limit_s
    rows_v = kit.rows_v.first(max(50, int(0.15 * kit.rows_s * trial_s)))
    space = {
        "lr": tune.loguniform(*LR), "epochs": tune.choice(EPOCHS), "batch": tune.choice(BATCHES),
        "weight_decay": tune.loguniform(*DECAY),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trial, kit=kit, rows_v=rows_v, trial_s=trial_s, seed=given.seed), {"cpu": 1}
            ),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="accuracy", mode="max", num_samples=-1, reuse_actors=True,
                time_budget_s=SEARCH * clock.limit_s - clock.used_s + empty_s,
                scheduler=ASHAScheduler(max_t=len(_LOOKS), grace_period=1, reduction_factor=3),
                search_alg=BasicVariantGenerator(
                    points_to_evaluate=[FIRST], max_concurrent=_AT_ONCE, random_state=given.seed
                ),
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )  # fmt: skip
        results = tuner.fit()
        seen = [r.metrics for r in results if r.metrics and "accuracy" in r.metrics]
    clock.give_back(empty_s)
    searched_s = clock.used_s
    # Longest trained first: accuracies at a third and at the end are not comparable.
    best = max(seen, key=lambda m: (m["training_iteration"], m["accuracy"]), default=None)
    found = best["config"] if best else FIRST
    model, updates = fine_tune(kit, settings(found), clock.left_s - END_S, given.seed)
    facts = {**kit.facts(), "best": found, "trials": len(results), "reported": len(seen), "updates": updates}
    return Fitted(
        predictor(model, kit),
        {**facts, "judged_on": len(rows_v), "searched_s": round(searched_s, 1), "given_back_s": round(empty_s, 1)},
    )
