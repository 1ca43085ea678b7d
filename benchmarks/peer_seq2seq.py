"""transformers' Seq2SeqTrainer on multi30k en-de for the same minutes: same architecture, tokenizer, data and decoding as ours.

    defaults    TrainingArguments as they are (AdamW at 5e-5, batches of 8, linear decay)
    competent   batches of 96 grouped by length, label smoothing 0.1, warm-up, bf16 where faster; the learning rate the best of a sweep
                of short runs, judged by validation loss (the sweep is not on its clock)

Training alone is on the clock; then test_2016 is written by our engine, greedily and with 4 beams. Run `language.py --problems multi30k`
in the same session: the two are compared in its table's folder by eye, seed by seed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, processors

from _common import Results, Row, data_folder, load_average, markdown, mean_sd, parser, select, values
from multistep.data.records import LanguageData, load_language
from multistep.generate import generate
from multistep.metrics.texts import measure_texts
from multistep.models.seq2seq import new_seq2seq
from multistep.predictors.decoding import Beam, Greedy
from multistep.subwords import train_bytes

BENCH = "peer_seq2seq"
WIDTH, LAYERS, VOCABULARY, PAD, BEGIN, END = 128, 4, 6000, 0, 1, 2
SWEEP = (1e-3, 2e-3, 4e-3)
SWEEP_SHARE = 0.1  # of the budget, for each
NEW_TOKENS = 60
_TIMED, _WARM = 60, 20  # steps that are timed, after so many: batches grouped by length begin with the longest
COMPETENT: dict[str, Any] = {  # but for precision and learning rate
    "per_device_train_batch_size": 96, "train_sampling_strategy": "group_by_length", "label_smoothing_factor": 0.1,
    "warmup_steps": 0.06, "adam_beta2": 0.98, "weight_decay": 0.01,
}  # fmt: skip


class Pairs(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, tokenizer: Tokenizer, records: list[Any]):
        self.sources = [e.ids for e in tokenizer.encode_batch([r.source for r in records])]
        self.targets = [e.ids for e in tokenizer.encode_batch([r.targets[0] for r in records])]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.sources[i], "labels": self.targets[i]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    def padded(name: str, fill: int) -> torch.Tensor:
        longest = max(len(r[name]) for r in rows)
        return torch.tensor([r[name] + [fill] * (longest - len(r[name])) for r in rows])

    ids, labels = padded("input_ids", PAD), padded("labels", -100)
    begin = torch.full((len(rows), 1), BEGIN)  # label smoothing takes the labels away before the model sees them
    decoder_ids = torch.cat([begin, labels[:, :-1].masked_fill(labels[:, :-1] < 0, PAD)], 1)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "decoder_input_ids": decoder_ids, "labels": labels}


def multi30k() -> tuple[LanguageData, Tokenizer]:
    """The records, and a tokenizer trained on train that ends every text."""
    data = load_language(data_folder("multi30k_en_de"), task="translate")
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        path = Path(folder) / "tokenizer.json"
        train_bytes([*(r.source for r in data.train), *(r.targets[0] for r in data.train)], VOCABULARY, path)
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return data, tokenizer


def trained(data: Pairs, budget_s: float, seed: int, settings: dict[str, Any]) -> tuple[Any, Row]:
    """A model trained for so long: the steps that fit are reckoned from a few, so that the schedule ends at zero."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    class Stop(TrainerCallback):
        warm_s = 0.0  # when the first steps were done

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == _WARM:
                self.warm_s = time.monotonic()
            if time.monotonic() - begun > budget_s:  # the Trainer's own end is left alone
                control.should_training_stop = True

    counts: list[int] = []  # tokens of the batches, in their order

    def counting(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        counts.append(sum(len(r["input_ids"]) + len(r["labels"]) for r in rows))
        return collate(rows)

    def trainer(steps: int, folder: str, callbacks: list[Any]) -> Any:
        arguments = Seq2SeqTrainingArguments(
            output_dir=folder, max_steps=steps, seed=seed, save_strategy="no", eval_strategy="no", logging_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, **settings,
        )  # fmt: skip
        model = new_seq2seq(VOCABULARY, WIDTH, LAYERS, 256, {"pad": PAD, "bos": BEGIN, "eos": END}, seed)
        return Seq2SeqTrainer(
            model=model, args=arguments, train_dataset=data, data_collator=counting, callbacks=callbacks
        )

    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        begun, timed = float("inf"), Stop()
        trainer(_TIMED, folder, [timed]).train()
        a_step = (time.monotonic() - timed.warm_s) / (_TIMED - _WARM)
        begun = time.monotonic()
        counts.clear()
        made = trainer(max(10, int(budget_s / a_step)), folder, [Stop()])
        made.train()
        train_s, steps = time.monotonic() - begun, made.state.global_step
        tokens_s = sum(counts[:steps]) / train_s  # the loader is a batch ahead
        return made.model, {
            "train_s": round(train_s, 1),
            "updates": steps,
            "tokens_s": round(tokens_s),
            "a_step_s": a_step,
        }


def judged(model: Any, tokenizer: Tokenizer, records: list[Any]) -> Row:
    sources = [np.array(e.ids) for e in tokenizer.encode_batch([r.source for r in records])]
    found: Row = {}
    for name, decoding in (
        ("greedy", Greedy(max_new_tokens=NEW_TOKENS)),
        ("beam", Beam(beams=4, max_new_tokens=NEW_TOKENS)),
    ):
        texts = [tokenizer.decode(w.ids) for w in generate(model.eval(), sources, decoding, [END])]
        bleu = measure_texts(["bleu"], texts, [r.targets for r in records])["bleu"]
        found |= {name: bleu.value, f"{name}_stderr": bleu.stderr}
    return found


@torch.no_grad()
def loss_of(model: Any, data: Pairs) -> float:
    model.eval()
    losses = [
        float(model(**collate([data[i] for i in range(n, min(n + 64, len(data)))])).loss)
        for n in range(0, len(data), 64)
    ]
    return float(np.mean(losses))


def run(
    system: str, budget_s: float, seed: int, data: LanguageData, tokenizer: Tokenizer, rates: Sequence[float]
) -> Row:
    train = Pairs(tokenizer, data.train)
    if system == "defaults":
        model, facts = trained(train, budget_s, seed, {})
        return {"ok": True, **facts, **judged(model, tokenizer, data.test)}
    held = Pairs(tokenizer, [*data.control, *data.calibration])
    common = dict(COMPETENT)
    steps = {bf16: trained(train, 0.0, seed, {**common, "bf16": bf16})[1]["a_step_s"] for bf16 in (True, False)}
    common["bf16"] = steps[True] < steps[False]
    losses = {
        lr: loss_of(trained(train, SWEEP_SHARE * budget_s, seed, {**common, "learning_rate": lr})[0], held)
        for lr in (rates if len(rates) > 1 else ())
    }
    lr = min(losses, key=lambda k: losses[k]) if losses else rates[0]
    model, facts = trained(train, budget_s, seed, {**common, "learning_rate": lr})
    return {
        "ok": True,
        "lr": lr,
        "bf16": common["bf16"],
        "sweep": {str(k): round(v, 4) for k, v in losses.items()},
        **facts,
        **judged(model, tokenizer, data.test),
    }


def table(rows: list[Row]) -> str:
    head = [
        "system",
        "budget",
        "runs",
        "test_2016 BLEU, greedy",
        "4 beams",
        "updates",
        "tokens/s (not padding)",
        "training, s",
        "lr",
    ]
    body = []
    for system in dict.fromkeys(r["system"] for r in rows):
        mine = select(rows, system=system)
        said = [
            mean_sd(values(mine, k), 2) if len(mine) > 1 else f"{mine[0][k]:.2f} ± {mine[0][f'{k}_stderr']:.2f}"
            for k in ("greedy", "beam")
        ]
        spent = [
            mean_sd(values(mine, "updates"), 0),
            mean_sd(values(mine, "tokens_s"), 0),
            mean_sd(values(mine, "train_s"), 1),
        ]
        body.append([system, mine[0]["budget"], len(mine), *said, *spent, mine[0].get("lr", "5e-5")])
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__, seeds=(0,))
    options.add_argument("--budget", default="900s", help="of training, in seconds")
    options.add_argument("--systems", nargs="+", choices=["defaults", "competent"], default=["defaults", "competent"])
    options.add_argument(
        "--rates", nargs="+", type=float, default=SWEEP, help="that are swept; one: it is taken as it is"
    )
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    data, tokenizer = multi30k()
    for seed in given.seeds:
        for system in given.systems:
            if not results.has("multi30k_en_de", given.budget, system, seed):
                before = load_average()
                ran = run(system, float(given.budget.removesuffix("s")), seed, data, tokenizer, given.rates)
                results.add("multi30k_en_de", given.budget, system, seed, ran, before)


if __name__ == "__main__":
    main()
