"""Small runs for the tests: synthetic data, a tiny encoder in a folder, budgets in updates so that nothing depends on the clock."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from multistep.api import Run, fit_config
from multistep.config import FitConfig
from multistep.report.progress import Progress
from multistep.subwords import train_tokenizer

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "river",
    "stone",
    "cloud",
    "light",
    "paper",
    "glass",
    "metal",
    "wood",
    "fire",
    "water",
    "earth",
    "wind",
]
LABELS = ("north", "south", "west")


def write_rows(path: Path, rows: int = 360, seed: int = 0, noise: float = 0.1, shuffled: bool = False) -> Path:
    """A CSV of texts whose class shows in one word of two orders; `noise`: the share of wrong labels."""
    rng = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(rows):
            k = rng.randrange(3)
            words = [rng.choice(WORDS) for _ in range(rng.randint(4, 12))]
            words.insert(rng.randrange(len(words)), ("up", "down", "left")[k])
            label = LABELS[rng.randrange(3)] if shuffled or rng.random() < noise else LABELS[k]
            writer.writerow([f"{' '.join(words)} {i}", label])
    return path


def tiny_encoder(folder: Path) -> Path:
    """A BERT of two layers, 32 wide, with random weights and a tokenizer of its own words."""
    folder.mkdir(parents=True)
    train_tokenizer([" ".join(WORDS), "up down left", *map(str, range(400))] * 3, 400, folder / "tokenizer.json")
    config = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def config(data: Path, out: Path, encoder: Path | str, **more: Any) -> FitConfig:
    settings: dict[str, Any] = {
        "data": str(data), "out": str(out), "model": str(encoder), "budget": "240 updates", "batch_size": 8,
        "optimizer": {"lr": 2e-3}, **more,
    }  # fmt: skip
    return FitConfig.parse(settings)


def run(cfg: FitConfig) -> Run:
    done = fit_config(cfg, Progress(quiet=True))
    wrong = [str(finding) for replayed in done.replay() for finding in replayed.findings]
    assert not wrong, wrong  # every run of the tests replays
    return done


def committed(run: Run) -> list[tuple[str, str]]:
    """(kind, trial) of every decision."""
    return [(r["kind"], r["trial"]) for r in run.records() if r["kind"] in ("Committed", "RolledBack")]


def of_kind(run: Run, kind: str) -> list[dict[str, Any]]:
    return [r for r in run.records() if r["kind"] == kind]


def same_states(a: Path, b: Path) -> None:
    """Every state of two runs is the same, bit for bit."""
    names = sorted(p.name for p in (a / "states").iterdir() if p.is_dir())
    assert names == sorted(p.name for p in (b / "states").iterdir() if p.is_dir())
    for name in names:
        for file in sorted((a / "states" / name).glob("*.safetensors")):
            one, other = load_file(file), load_file(b / "states" / name / file.name)
            assert one.keys() == other.keys()
            for key in one:
                assert torch.equal(one[key], other[key]), f"{name}/{file.name}: {key} differs"
