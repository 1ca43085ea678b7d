"""Forced events of training: whole runs, tiny and in updates, that end with exactly the diagnosis that is due."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from test_diagnose import encoder, flip, folder, marked  # noqa: F401 - a fixture among them
from test_modules import Data, blobs, network
from test_modules import run as optimize
from test_recovery import Hopeless
from torch import nn

from multistep.optimizers import AdamW

pytestmark = pytest.mark.usefixtures("torch_seeded")
OF_TRAINING = {"divergence", "overfitting", "underfitting", "plateau", "budget too small"}


def at_end(result: Any) -> dict[str, dict[str, Any]]:
    """What was found at the end, by name."""
    return {r["name"]: r for r in result.records() if r["kind"] == "Diagnosed" and r.get("at") == "end"}


def of_training(result: Any) -> set[str]:
    (replayed,) = result.replay()
    assert replayed.ok and replayed.derived["diagnoses"] >= 2 and not replayed.unchecked, replayed
    return set(at_end(result)) & OF_TRAINING


def told(result: Any, stage: str) -> dict[str, Any]:
    return next(r["outcome"] for r in result.records() if r["kind"] == "Told" and r["stage"] == stage)


# ---------------------------------------------------------------------------------------------- too slow, too long


def test_a_rate_that_is_far_too_low_underfits_and_more_time_would_help() -> None:
    result = optimize(
        train=blobs(600, 0, noise=1.0), validation=blobs(300, 1, noise=1.0), metric="loss", controller="staged",
        optimizer={"kind": "adamw", "lr": 3e-4}, schedule="constant", budget="300 updates",
    )  # fmt: skip
    assert of_training(result) == {"underfitting", "budget too small"}
    slow, law = at_end(result)["underfitting"], at_end(result)["budget too small"]
    assert "03-trunk: training loss" in slow["words"] and "both still fall" in slow["words"]
    assert "budget='600 updates'" in slow["action"] and '"lr": 0.0006' in slow["action"]
    assert law["numbers"]["loss_of"] == "validation" and law["numbers"]["points"] == 18
    assert law["numbers"]["low"] > 0.01 * law["numbers"]["loss"] and "budget='600 updates'" in law["action"]


class Blind(nn.Module):
    """Does not see what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(len(x), 3)


def test_what_learns_nothing_is_on_a_plateau() -> None:
    def even(n: int) -> Data:
        return torch.zeros(n, 8), torch.arange(n) % 3

    result = optimize(
        Blind(), train=even(300), validation=even(201), metric="loss", controller="staged",
        optimizer={"kind": "adamw", "lr": 0.01}, budget="300 updates",
    )  # fmt: skip
    assert of_training(result) == {"plateau"}
    said = at_end(result)["plateau"]
    assert said["numbers"]["gain"] <= 2 * said["numbers"]["stderr"] and said["numbers"]["looks"] == 10
    assert "more time will not help" in said["action"]


# ---------------------------------------------------------------------------------------------- divergence


def test_what_diverges_at_every_rate_says_at_which() -> None:
    result = optimize(Hopeless(), budget="600 updates", optimizer={"kind": "adamw", "lr": 1e-3}, controller="staged")
    assert of_training(result) == {"divergence"}
    said = at_end(result)["divergence"]
    assert said["numbers"] == {
        "trial": "03-trunk",
        "lr": 1e-3,
        "last_lr": pytest.approx(1e-6),
        "restarts": 3,
        "rollbacks": 0,
    }
    assert "03-trunk diverged at learning rate 0.001, began again 3 times" in said["words"]
    assert "and diverged at 1e-06 too: 20 losses in a row" in said["words"] and "bad batches" not in said["words"]
    assert said["action"].endswith('optimize(..., optimizer={"kind": "adamw", "lr": 3.3e-07})')


class Touchy(nn.Module):
    """Says the wrong thing from an update on that moves a weight by more than `most`."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.inner, self.most = network(), most
        self.register_buffer("before", self._weight().clone())
        self.register_buffer("broken", torch.zeros(()))

    def _weight(self) -> torch.Tensor:
        return next(self.inner.parameters()).detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.broken += (self._weight() - self.before).abs().max() > self.most
            self.before.copy_(self._weight())
        return self.inner(x) + 20 * (self.broken > 0) * torch.eye(3)[0]


def test_a_probe_that_diverges_is_no_divergence_of_the_run() -> None:
    """At three times the prior the probe does; the trunk is trained at the prior, and well."""
    prior = AdamW.rates["scratch"].prior
    result = optimize(
        Touchy(2 * prior), optimizer={"kind": "adamw"}, controller="staged", metric="loss", budget="1400 updates"
    )
    asked = {r["trial"]["id"]: r["trial"] for r in result.records() if r["kind"] == "Asked"}
    seen = [r for r in result.records() if r["kind"] == "Diagnosed" and r.get("at") != "end"]
    assert [(r["name"], asked[r["trial"]]["stage"]) for r in seen] == [("divergence", "race")]
    assert told(result, "trunk")["verdict"]["accept"] and told(result, "trunk")["facts"]["rollbacks"] == 0
    assert "divergence" not in of_training(result)
    page = result.explain_page(result.out / "page.html").read_text(encoding="utf-8")
    assert "a third of the rate" not in page, "it does not lead what to do next"


# ---------------------------------------------------------------------------------------------- rows


def rare(n: int, seed: int) -> list[list[Any]]:
    """Texts whose class shows in one word, of a hundred for each class: [text, label]."""
    rng, name = random.Random(seed), random.Random(5)
    marks = [["".join(name.choices("bcdfghjklmnpqrstvwz", k=7)) for _ in range(100)] for _ in runs.LABELS]
    rows = []
    for i in range(n):
        k = rng.randrange(3)
        words = rng.choices(runs.WORDS, k=4)
        words.insert(rng.randrange(4), rng.choice(marks[k]))
        rows.append([f"{' '.join(words)} {seed}x{i}", runs.LABELS[k]])
    return rows


def test_words_that_were_hardly_seen_are_too_little_data(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", train=rare(400, 0), validation=rare(400, 1), test=rare(60, 2))
    result = runs.run(runs.config(data, tmp_path / "run", "none"))
    said = at_end(result)["too little data"]
    assert said["numbers"]["rows"] == 400 and said["numbers"]["gain"] > 0.1 * said["numbers"]["errors"]
    assert said["numbers"]["low"] > 0 and said["action"] == "label more rows: 400 more would pay"
    assert not of_training(result), "nothing was trained by gradients"


# ---------------------------------------------------------------------------------------------- 200 rows


def test_two_hundred_rows_are_known_by_heart(tmp_path: Path, encoder: Path) -> None:  # noqa: F811
    """A third of the labels is wrong. The watch sees it at its third look, after ten epochs; nothing that was trained on is served, since it is
    no better than what stood."""
    (train, _), (validation, _) = flip(marked(200), 0.3), flip(marked(300, 1), 0.3)
    data = folder(tmp_path / "d", train=train, validation=validation, test=marked(60, 2))
    result = runs.run(runs.config(data, tmp_path / "run", encoder, optimizer={"lr": 5e-3}, budget="400 updates"))
    assert of_training(result) == {"overfitting"}
    trunk, said = told(result, "trunk"), at_end(result)["overfitting"]
    looks = trunk["facts"]["looks"]
    assert said["words"].startswith("05-trunk: validation loss") and "while the training loss fell" in said["words"]
    assert said["action"].startswith("add rows; without them, regularize: ") and "dropout=0.1" in said["action"]
    assert (
        said["numbers"] == {"trial": "05-trunk", "looks": looks}
        and trunk["facts"]["diagnosis"]["name"] == "overfitting"
    )
    assert [k["updates"] for k in looks] == [120, 180, 240]
    assert [k["validation_loss"] for k in looks] == sorted(k["validation_loss"] for k in looks)
    assert looks[2]["train_loss"] < looks[0]["train_loss"] and all(k["change_stderr"] > 0 for k in looks[1:])
    stages = [r["trial"]["stage"] for r in runs.of_kind(result, "Asked")]
    assert stages[stages.index("trunk") :][1:3] == ["regularize", "go on"]
    served = served_after(result)
    assert served["trunk"] == served["go on"] == served["head"], "neither the trunk that was stopped nor its forks"


def served_after(result: Any) -> dict[str, Any]:
    """The incumbent after the trials of each stage, as the controller was told."""
    stands: Any = None
    found = {}
    for r in result.records():
        if r["kind"] in ("Committed", "RolledBack"):
            stands = r["incumbent"], r["families"]
        if r["kind"] in ("Told", "Committed", "RolledBack"):
            found[r["stage"]] = stands
    return found


def test_a_wide_network_knows_two_hundred_rows_in_its_first_epochs() -> None:
    """Two in five of the labels are wrong: the best look is in the first epoch, and in the second one the watch has seen enough."""
    x, y = blobs(200, 0)
    y = torch.where(torch.rand(200, generator=torch.Generator().manual_seed(3)) < 0.4, (y + 1) % 3, y)
    result = optimize(
        network(hidden=1024), train=(x, y), validation=blobs(400, 1), metric="loss", controller="staged",
        optimizer={"kind": "adamw", "lr": 0.003}, batch_size=8, budget="100 updates",
    )  # fmt: skip
    assert of_training(result) == {"overfitting"}
    (seen,) = [r for r in result.records() if r["kind"] == "Diagnosed" and r.get("at") != "end"]
    best, now, epoch = seen["numbers"]["best"], seen["numbers"]["now"], 200 / 8
    assert seen["name"] == "overfitting" and best["updates"] < epoch < now["updates"] <= 2 * epoch
    assert at_end(result)["overfitting"]["words"].startswith("03-trunk: validation loss")
    given = told(result, "incumbent")["metrics"]["loss"][0]
    assert result.best.value < given and result.best.value <= best["validation_loss"] * (1 + 1e-6), (
        "the best look, or better"
    )
