"""Two peers of course.py: transformers' Trainer as it comes, and as one who has used it before writes it.

    trainer-defaults    TrainingArguments as they are (batch 8, 5e-5, 3 epochs, fp32, whole texts up to the model's 512 tokens), stopped
                        when its minutes are up
    trainer-competent   learning rate 2e-4, batches of 32, and what peer_encoder.py says

Neither looks at validation: there is nothing to choose, and looking costs time.
"""

from __future__ import annotations

import tempfile

from _peers import Fitted, Given
from peer_encoder import ByTheClock, Encoded, Settings, fine_tune, label_numbers, predictor, prepare
from peer_trainer import trainer

_END_S = 1.0  # of the minutes, for what the Trainer does after its last update


def defaults(given: Given) -> Fitted:
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        clock = ByTheClock(given.clock.left_s - _END_S)
        made = trainer("defaults", given.texts, given.labels, given.seed, folder, callbacks=[clock])
        made.train()
    model, tokenizer, names = made.model, made.processing_class, given.names

    def predict(texts: list[str]) -> list[str]:
        ids = tokenizer(texts, truncation=True)["input_ids"]  # type: ignore[operator]  # a tokenizer
        return [names[i] for i in label_numbers(model, tokenizer, Encoded(ids, [0] * len(ids)), bf16=False)]

    return Fitted(predict, {"updates": made.state.global_step, "epochs": round(made.state.epoch or 0.0, 2)})


def competent(given: Given) -> Fitted:
    kit = prepare(given)
    model, updates = fine_tune(kit, Settings(), given.clock.left_s - _END_S, given.seed)
    return Fitted(predictor(model, kit), {**kit.facts(), "updates": updates})
