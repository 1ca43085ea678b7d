"""The loop belongs to the reader: train a tiny encoder by hand with `train`, which yields measurements; stop, fork, go on."""

from __future__ import annotations

import numpy as np
import torch

from multistep.budget import Budget
from multistep.evaluate import Rows
from multistep.models.encoder import Encoder, new_backbone
from multistep.optimizers import AdamW
from multistep.state import TrainState
from multistep.strategy import FineTune
from multistep.train import train


def toy_rows(n: int, seed: int) -> Rows:
    """Sequences of 12 token ids; the class says whether token 7 is among them."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(8, 50, size=12) for _ in range(n)]
    targets = rng.integers(0, 2, size=n)
    for row, target in zip(ids, targets, strict=True):
        if target:
            row[rng.integers(12)] = 7
    return Rows([i.astype(np.int32) for i in ids], pad_id=0, device="cpu", targets=torch.from_numpy(targets))


def main() -> None:
    model = Encoder(new_backbone(vocab_size=50, pad_id=0, width=32, layers=2, max_length=32, seed=0), n_outputs=2)
    state = TrainState(model)
    strategy = FineTune(trains="all", layers=2, optimizer=AdamW(lr=3e-3), batch_size=32)
    state.begin(strategy, Budget(amount=300, unit="updates"))
    rows = toy_rows(1000, seed=0)
    for measure in train(state, rows):
        if measure.update % 50 == 0:
            print(f"update {measure.update:3d}  loss {measure.loss_nats:.3f} nats  lr {measure.lr:.1e}")
        if measure.update == 150:
            break  # stopping loses nothing

    twin = (
        state.fork()
    )  # a second future of the same state, with stronger weight decay; a live field, so momentum is kept
    twin.adjust(strategy.with_(optimizer=AdamW(lr=3e-3, weight_decay=0.1)))
    for name, one in (("as before", state), ("more decay", twin)):
        last = 0.0
        for measure in train(one, rows):
            last = measure.loss_nats
        print(f"{name}: {last:.4f} nats after {one.counters.update} updates")


if __name__ == "__main__":
    main()
