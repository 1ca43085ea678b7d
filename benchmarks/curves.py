"""Learning curves of many settings, recorded for `replays.py`: which rows of validation and test each got right, all along its training.

A small network on hashed words and pairs of words (characters for Chinese) of four datasets, trained by our own loop: 40 settings of
learning rate, weight decay and label smoothing (Sobol points), each a trunk whose rate stays, with a cool-down branch from every one of
its ten marks. A mark's answers are those after the cool-down. Budgets are in updates, so the machine's mood changes nothing.
Shapes: S settings, T marks, N rows.
"""

from __future__ import annotations

import argparse
import json
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor, nn

from _common import ROOT, load
from multistep.budget import Budget
from multistep.loader import rows_of
from multistep.objectives import CrossEntropy
from multistep.optimizers import AdamW
from multistep.schedules import Constant, Linear
from multistep.state import TrainState
from multistep.strategy import TrainModule
from multistep.train import train

DATASETS = ("banking77", "imdb", "sst2", "chnsenticorp")
FOLDER = ROOT / "benchmarks" / "curves"
SETTINGS, MARKS, STRETCH = 40, 10, 50  # updates between marks
COOL = 0.25  # of what was trained by then
PRIOR, FACTOR = AdamW.rates["scratch"].prior, 40.0  # the rates lie within the factor each way
TRAIN, CONTROL, TEST = 6000, 500, 2000  # rows
BUCKETS, LENGTH, WIDTH = 2**15, 192, 96


class Bag(nn.Module):
    """The mean of hashed embeddings [N,L] through one hidden layer."""

    def __init__(self, classes: int):
        super().__init__()
        self.embed = nn.EmbeddingBag(BUCKETS, WIDTH, mode="mean", padding_idx=0)
        self.layers = nn.Sequential(nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))

    def forward(self, ids_NL: Tensor) -> Tensor:
        return self.layers(self.embed(ids_NL))


def ids_of(texts: list[str], characters: bool) -> Tensor:
    ids_NL = np.zeros((len(texts), LENGTH), np.int64)
    for row, text in enumerate(texts):
        words = list(text) if characters else text.lower().split()
        pieces = (words + [f"{a} {b}" for a, b in pairwise(words)])[:LENGTH]
        ids_NL[row, : len(pieces)] = [1 + zlib.crc32(p.encode()) % (BUCKETS - 1) for p in pieces]
    return torch.from_numpy(ids_NL)


def settings() -> np.ndarray:
    """[S,3]: learning rate, weight decay, label smoothing. The first is the calibrated prior."""
    u_S3 = qmc.Sobol(3, seed=0).random(64)[: SETTINGS - 1]  # pyright: ignore[reportCallIssue] - `rng` draws other points
    rate_S = PRIOR * FACTOR ** (2 * u_S3[:, 0] - 1)
    decay_S = 1e-4 * 1e4 ** u_S3[:, 1]
    prior = AdamW()
    rows = np.stack([rate_S, decay_S, 0.2 * u_S3[:, 2]], axis=1)
    return np.concatenate([[[PRIOR, prior.weight_decay, 0.0]], rows])


def record(dataset: str) -> dict[str, np.ndarray]:
    """Who is right [S,T,N] on control and test, as packed bits, and the training loss [S,T]."""
    random = np.random.default_rng(0)
    splits: dict[str, tuple[Tensor, Tensor]] = {}
    names: list[str] = []
    for split, source, most in (("train", "train", TRAIN), ("control", "validation", CONTROL), ("test", "test", TEST)):
        texts, labels = load(dataset, source)
        names = names or sorted(set(labels))
        take = random.permutation(len(texts))[:most]
        targets = torch.tensor([names.index(labels[i]) for i in take])
        splits[split] = ids_of([texts[i] for i in take], dataset == "chnsenticorp"), targets
    data = rows_of(splits["train"], "train", "cpu")
    right: dict[str, list[list[np.ndarray]]] = {"control": [], "test": []}
    losses = []
    for number, (rate, decay, smoothing) in enumerate(settings()):
        torch.manual_seed(0)
        state = TrainState(Bag(len(names)))
        strategy = TrainModule(
            optimizer=AdamW(lr=float(rate), weight_decay=float(decay)), objective=CrossEntropy(label_smoothing=float(smoothing)),
            schedule=Constant(warmup=0.06), batch_size=32,
        )  # fmt: skip
        marks: dict[str, list[np.ndarray]] = {"control": [], "test": []}
        curve = []
        for mark in range(MARKS):
            state.begin(strategy.with_(schedule=Constant(warmup=0.0 if mark else 0.06)), _updates(STRETCH))
            seen = [m.loss_nats for m in train(state, data)]
            curve.append(float(np.mean(seen[-STRETCH // 2 :])))
            branch = state.fork()
            branch.begin(strategy.with_(schedule=Linear(warmup=0.0)), _updates(round(COOL * STRETCH * (mark + 1))))
            for _ in train(branch, data):
                pass
            branch.model.eval()
            for split, answers in marks.items():
                ids_NL, targets_N = splits[split]
                with torch.no_grad():
                    answers.append((branch.model(ids_NL).argmax(1) == targets_N).numpy())
        for split, answers in marks.items():
            right[split].append(answers)
        losses.append(curve)
        print(
            f"{dataset}: setting {number + 1} of {SETTINGS}, lr {rate:.2g}: {np.mean(marks['control'][-1]):.3f}",
            flush=True,
        )
    found = {split: np.packbits(np.array(bits), axis=-1) for split, bits in right.items()}
    sizes = np.array([len(splits["control"][1]), len(splits["test"][1])])
    return {**found, "sizes": sizes, "losses": np.array(losses, np.float32), "settings": settings()}


def _updates(count: int) -> Budget:
    return Budget(amount=count, unit="updates")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    options.add_argument("--folder", type=Path, default=FOLDER, help="what is there is kept")
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for dataset in given.datasets:
        path = given.folder / f"{dataset}.npz"
        if not path.exists():
            found = record(dataset)
            np.savez_compressed(path, allow_pickle=False, **found)
            facts = {"settings": SETTINGS, "marks": MARKS, "stretch": STRETCH, "cool": COOL, "train": TRAIN}
            (given.folder / "facts.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
