"""Two peers of course.py on tinyshakespeare: transformers' Trainer on a small Llama from random weights, with settings or with Optuna.

gpt-trainer   four layers, width 128, windows of 128 characters, batches of 16, AdamW at 3e-3, beta2 0.99, decay 0.1, warm-up over a
              tenth, linear decay to zero at the end of the minutes, by the clock; bf16 if an update is faster with it
gpt-optuna    TPE, pruned by the median at half of a trial, over rate, batch, width, layers, context and decay, in the shares of
              peer_search.py, each trial decayed to its end; judged by the loss on the last tenth of what it was given; a refit of the best
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optuna
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from _peers import FittedText, GivenText
from peer_encoder import ByTheClock, decaying
from peer_gpt import LOOK_WINDOWS, Characters, Logits, characters, loss_on, nats_of
from peer_search import END_S, SEARCH, TRIAL

HEAD_WIDTH, STRIDE, BETAS = 32, 8, (0.9, 0.99)  # of attention; between the starts of windows to draw from
LR, BATCHES, WIDTHS, LAYERS, CONTEXTS, DECAY = (
    (5e-4, 1e-2),
    (8, 16, 32),
    (96, 128, 192),
    (2, 4, 6),
    (64, 128),
    (1e-2, 0.5),
)
_ENDLESS, _TIMED = 1_000_000, 3


class Shape(NamedTuple):
    lr: float = 3e-3
    batch: int = 16
    width: int = 128
    layers: int = 4
    context: int = 128
    weight_decay: float = 0.1


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of a text, a new one every few characters; labels are the same ids, which the model shifts."""

    def __init__(self, ids_N: Tensor, context: int):
        self.ids_N, self.context = ids_N, context

    def __len__(self) -> int:
        return (len(self.ids_N) - self.context - 1) // STRIDE

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        cut = self.ids_N[row * STRIDE : row * STRIDE + self.context + 1]
        return {"input_ids": cut, "labels": cut}


def new_model(shape: Shape, vocabulary: int, seed: int) -> Any:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape.width, intermediate_size=64 * round(shape.width * 8 / 3 / 64),
        num_hidden_layers=shape.layers, num_attention_heads=shape.width // HEAD_WIDTH, max_position_embeddings=512,
        tie_word_embeddings=True, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def logits_of(model: Any, bf16: bool) -> Logits:
    def logits(ids_BT: Tensor) -> Tensor:
        model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(input_ids=ids_BT).logits

    return logits


def bf16_is_faster(found: Characters, seed: int) -> bool:
    """By a few forward and backward passes of the shape that nobody searched for."""
    shape, spent = Shape(), {}
    model, rows = new_model(shape, len(found.known), seed), Windows(found.train_N, shape.context)
    batch = torch.stack([rows[i]["input_ids"] for i in range(shape.batch)])
    for bf16 in (False, True):
        begun = 0.0
        for n in range(_TIMED + 1):
            begun = time.monotonic() if n == 1 else begun
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
        spent[bf16] = time.monotonic() - begun
    return spent[True] < spent[False]


def trained(
    found: Characters, shape: Shape, bf16: bool, seconds: float, seed: int, look: Callable[[Any], bool] | None = None
) -> tuple[Any, int]:
    """A model trained for so long, and its updates. `look`, at half of them, answers whether to go on."""
    begun = time.monotonic()
    model = new_model(shape, len(found.known), seed)
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        arguments = TrainingArguments(
            output_dir=folder, seed=seed, max_steps=_ENDLESS, use_cpu=True, save_strategy="no", report_to="none",
            logging_strategy="no", disable_tqdm=True, per_device_train_batch_size=shape.batch, bf16=bf16,
        )  # fmt: skip
        left_s = seconds - (time.monotonic() - begun)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=shape.lr, betas=BETAS, weight_decay=shape.weight_decay, fused=True
        )
        clock = ByTheClock(left_s, () if look is None else (0.5,), None if look is None else partial(look, model))
        trainer = Trainer(
            model=model, args=arguments, train_dataset=Windows(found.train_N, shape.context), callbacks=[clock],
            optimizers=(optimizer, decaying(optimizer, left_s)),
        )  # fmt: skip
        trainer.train()
    return model, trainer.state.global_step


def competent(given: GivenText) -> FittedText:
    clock, found, shape = given.clock, characters(given.text), Shape()
    found = found._replace(train_N=torch.cat([found.train_N, found.held_N]))  # nothing is chosen with it
    bf16 = bf16_is_faster(found, given.seed)
    model, updates = trained(found, shape, bf16, clock.left_s - END_S, given.seed)
    facts = {"updates": updates, "bf16": bf16, "best": shape._asdict()}
    return FittedText(lambda rows: nats_of(logits_of(model, bf16), found, rows, shape.context), facts)


def tpe(given: GivenText) -> FittedText:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    clock, found = given.clock, characters(given.text)
    bf16, trial_s = bf16_is_faster(found, given.seed), TRIAL * clock.limit_s
    study = optuna.create_study(
        direction="minimize", sampler=optuna.samplers.TPESampler(seed=given.seed, n_startup_trials=4),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0),
    )  # fmt: skip
    study.enqueue_trial(Shape()._asdict())
    while clock.used_s + trial_s < SEARCH * clock.limit_s or not study.trials:
        _one(study, found, bf16, trial_s, given.seed)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    shape = Shape(**study.best_params) if done else Shape()
    model, updates = trained(found, shape, bf16, clock.left_s - END_S, given.seed)
    facts = {
        "updates": updates,
        "bf16": bf16,
        "best": shape._asdict(),
        "trials": len(study.trials),
        "complete": len(done),
    }
    return FittedText(lambda rows: nats_of(logits_of(model, bf16), found, rows, shape.context), facts)


def _one(study: optuna.Study, found: Characters, bf16: bool, trial_s: float, seed: int) -> None:
    trial = study.ask()
    shape = Shape(
        lr=trial.suggest_float("lr", *LR, log=True), batch=trial.suggest_categorical("batch", BATCHES),
        width=trial.suggest_categorical("width", WIDTHS), layers=trial.suggest_categorical("layers", LAYERS),
        context=trial.suggest_categorical("context", CONTEXTS),
        weight_decay=trial.suggest_float("weight_decay", *DECAY, log=True),
    )  # fmt: skip
    pruned = False

    def loss(model: Any) -> float:
        return loss_on(logits_of(model, bf16), found.held_N, shape.context, LOOK_WINDOWS)

    def look(model: Any) -> bool:
        nonlocal pruned
        trial.report(loss(model), 0)
        pruned = trial.should_prune()
        return not pruned

    model, _ = trained(found, shape, bf16, trial_s, seed, look)
    if pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, loss(model))
