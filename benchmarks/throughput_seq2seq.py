"""Training throughput of a sequence-to-sequence model, in tokens that are not padding a second: ours and transformers' Seq2SeqTrainer,
in turns, on the same model (4 + 4 layers, 128 wide, vocabulary 6,000), the same tokens of multi30k and AdamW on both sides.

    ours                 96 pairs an update, bucketed by length, bf16 or fp32, whichever is faster
    trainer-defaults     TrainingArguments as they are: batches of 8, fp32
    trainer-competent    batches of 96 grouped by length, bf16 or fp32, whichever is faster

A seed is a round. The first updates of ours are not counted; the Trainer's seconds begin with its own timed steps done.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from _common import Results, Row, load_average, markdown, mean_sd, parser, select, values
from multistep.budget import Budget
from multistep.models.seq2seq import new_seq2seq
from multistep.objectives import Seq2Seq
from multistep.optimizers import AdamW
from multistep.sequences import PairRows
from multistep.state import TrainState
from multistep.strategy import Shape, TrainWriter
from multistep.train import train
from peer_seq2seq import BEGIN, COMPETENT, END, LAYERS, PAD, VOCABULARY, WIDTH, Pairs, multi30k, trained

BENCH = "throughput_seq2seq"
ROWS, WARM = 96, 3
SHORT_S = 10.0  # for finding the faster precision


def ours(data: Pairs, seconds: float, seed: int, bf16: bool) -> float:
    state = TrainState(new_seq2seq(VOCABULARY, WIDTH, LAYERS, 256, {"pad": PAD, "bos": BEGIN, "eos": END}, seed))
    sources, targets = ([np.array(ids) for ids in side] for side in (data.sources, data.targets))
    rows = PairRows(sources, targets, PAD, BEGIN, "cpu")
    rows.whole = False
    strategy = TrainWriter(
        optimizer=AdamW(lr=4e-3), objective=Seq2Seq(label_smoothing=0.1), batch_size=ROWS, bf16=bf16,
        shape=Shape(reads="pairs", width=WIDTH, layers=LAYERS, vocabulary=VOCABULARY, context=256),
    )  # fmt: skip
    state.begin(strategy, Budget(amount=seconds, unit="seconds"))
    begun, before, tokens = 0.0, 0, 0
    for measure in train(state, rows, bf16=bf16):
        if measure.update == WARM:
            begun, before = time.monotonic(), measure.tokens
        tokens = measure.tokens
    return (tokens - before) / (time.monotonic() - begun)


def tokens_s(system: str, data: Pairs, seconds: float, seed: int) -> Row:
    """The faster precision is found in short measurements; the one that counts sees batches of all lengths."""

    def measured(bf16: bool, limit_s: float) -> float:
        if system == "ours":
            return ours(data, limit_s, seed, bf16)
        settings = {} if system == "trainer-defaults" else {**COMPETENT, "learning_rate": 4e-3, "bf16": bf16}
        return trained(data, limit_s, seed, settings)[1]["tokens_s"]

    tried = {False: 0.0} if system == "trainer-defaults" else {bf16: measured(bf16, SHORT_S) for bf16 in (True, False)}
    bf16 = max(tried, key=lambda k: tried[k])
    return {"ok": True, "tokens_s": measured(bf16, seconds), "bf16": bf16}


def table(rows: list[Row]) -> str:
    head = ["system", "rounds", "tokens/s", "precision", "ours / this"]
    mine = values(select(rows, system="ours"), "tokens_s")
    body: list[list[Any]] = []
    for system in dict.fromkeys(r["system"] for r in rows):
        found = select(rows, system=system)
        ratio = mean_sd([a / b for a, b in zip(mine, values(found, "tokens_s"), strict=False)], 2)
        precision = "bf16" if found[0].get("bf16") else "fp32"
        body.append([system, len(found), mean_sd(values(found, "tokens_s"), 0), precision, ratio])
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=60, help="of every measurement; an epoch, about")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    data, tokenizer = multi30k()
    pairs = Pairs(tokenizer, data.train)
    for round_ in given.seeds:
        for system in ("ours", "trainer-defaults", "trainer-competent"):
            if not results.has("multi30k_en_de", f"{given.seconds:g}s", system, round_):
                before = load_average()
                row = tokens_s(system, pairs, given.seconds, round_)
                results.add("multi30k_en_de", f"{given.seconds:g}s", system, round_, row, before)


if __name__ == "__main__":
    main()
