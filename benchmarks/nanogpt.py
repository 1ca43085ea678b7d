"""Against karpathy/nanoGPT on its CPU recipe: a GPT of 0.80 million parameters on the characters of Shakespeare, in turns, seed by seed.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/nanogpt.py --nanogpt nanoGPT

The peer is its train.py, unchanged, with the options of its README. Ours is `multistep.optimize` on the same architecture
(gpt.py; the same initial distribution), the same characters to learn from, the settings of OURS. Both are whole
processes: Python's start, reading, training and the looks at validation are on the clock. Then the weights of both
are judged alike, off the clock, on the whole of the last tenth: nats a character over windows of 64, deterministic.
nanoGPT's own estimate (20 random batches) stands beside it. The peer has no option for a seed: its runs differ in time only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import multistep
from _common import Results, Row, load_average, markdown, mean_sd, parser, select, values
from gpt import GPT, GPTSize, characters, ids, text, windows

BENCH = "nanogpt"
RECIPE = {
    "device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 100, "block_size": 64, "batch_size": 12, "n_layer": 4,
    "n_head": 4, "n_embd": 128, "dropout": 0.0,
}  # fmt: skip
UPDATES = 500  # of ours
# Chosen on the last tenth of train, with seeds that are not reported (100 to 103; LOG.md, 2026-11-25).
OURS = {"optimizer": {"kind": "muon", "lr": 3e-2, "momentum": 0.85}, "batch_size": 12, "bf16": True}
LOOK_EVERY = 8  # ours looks at every eighth window of validation, as many characters as one estimate of the peer
NAMES = {
    "ln_1": "first_norm",
    "attn.c_attn": "attend",
    "attn.c_proj": "attended",
    "ln_2": "second_norm",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}


# ---------------------------------------------------------------------------------------------- the two processes


def prepare(nanogpt: Path) -> None:
    """Run its prepare.py on our copy of the text. It finds the text there and so has no use for `requests`, which need not be installed."""
    folder = nanogpt / "data" / "shakespeare_char"
    (folder / "input.txt").write_text(text("train") + text("validation"), encoding="utf-8")
    script = "import runpy, sys; sys.modules['requests'] = sys; runpy.run_path('prepare.py', run_name='__main__')"
    subprocess.run([sys.executable, "-c", script], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    cut = np.fromfile(folder / "val.bin", dtype=np.uint16)
    assert torch.equal(torch.from_numpy(cut.astype(np.int64)), ids("validation")), "the two validation splits differ"


def peer(nanogpt: Path, out: Path, updates: int) -> Row:
    """Its train.py: whole-process seconds, its own estimate, and the full validation loss of the checkpoint it keeps (its best)."""
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py"]
    recipe = {**RECIPE, "max_iters": updates, "lr_decay_iters": updates, "out_dir": out}
    command += [f"--{key}={value}" for key, value in recipe.items()]
    start = time.monotonic()
    done = subprocess.run(command, cwd=nanogpt, capture_output=True, text=True, check=False)
    wall_s = time.monotonic() - start
    if done.returncode:
        return {"ok": False, "wall_s": round(wall_s, 2), "error": done.stderr[-500:]}
    estimates = [float(found) for found in re.findall(r"val loss ([0-9.]+)", done.stdout)]
    model = GPT(GPTSize(len(characters())))
    model.load_state_dict(translated(torch.load(out / "ckpt.pt", weights_only=True)["model"]))
    return {"ok": True, "wall_s": round(wall_s, 2), "loss": full_loss(model), "own_estimate": min(estimates)}


def translated(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of nanoGPT's model under the names of ours."""
    found = {"head.weight": theirs["lm_head.weight"], "characters.weight": theirs["lm_head.weight"]}
    found |= {"places.weight": theirs["transformer.wpe.weight"], "norm.weight": theirs["transformer.ln_f.weight"]}
    for name, value in theirs.items():
        if match := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", name):
            found[f"blocks.{match[1]}.{NAMES[match[2]]}.weight"] = value
    return found


def ours(updates: int, seed: int, out: Path) -> Row:
    """This file as a process of its own, with --train: whole-process seconds and the full validation loss."""
    command = [sys.executable, __file__, "--train", str(out), "--updates", str(updates), "--seeds", str(seed)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall_s = time.monotonic() - start
    if done.returncode:
        return {"ok": False, "wall_s": round(wall_s, 2), "error": done.stderr[-500:]}
    model = GPT(GPTSize(len(characters())))
    model.load_state_dict(load_file(out), strict=False)  # the tied table is in it once
    return {"ok": True, "wall_s": round(wall_s, 2), "loss": full_loss(model), "own_estimate": float(done.stdout)}


def train(updates: int, seed: int, out: Path) -> None:
    """What a user would write. Prints the loss on the windows it looked at."""
    look = windows("validation", stride=64)
    result = multistep.optimize(
        GPT(GPTSize(len(characters())), seed=seed), objective="next_token",
        train=windows("train", stride=64),  # windows that do not overlap: nothing is seen twice
        validation=(look[0][::LOOK_EVERY], look[1][::LOOK_EVERY]), metric="loss", budget=f"{updates} updates",
        controller="fixed", seed=seed, **OURS,
    )  # fmt: skip
    save_file({n: p.detach().clone() for n, p in result.model.named_parameters()}, out)
    print(result.best.value)


@torch.no_grad()
def full_loss(model: GPT) -> float:
    """Nats a character over all windows of 64 of the validation text, which do not overlap."""
    model.eval()
    x_NT, y_NT = windows("validation", stride=64)
    parts = zip(x_NT.split(64), y_NT.split(64), strict=True)
    total = sum(float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")) for x, y in parts)
    return round(total / y_NT.numel(), 4)


# ---------------------------------------------------------------------------------------------- table, command


def table(rows: list[Row]) -> str:
    head = ["system", "runs", "full validation loss, nats", "own estimate", "whole process, s", "times the peer's time"]
    base = {s: values(select(rows, system=s), "wall_s") for s in dict.fromkeys(row["system"] for row in rows)}
    body = []
    for system, seconds in base.items():
        mine = select(rows, system=system)
        theirs = base.get("nanoGPT", [])
        ratio = f"{(sum(seconds) / len(seconds)) / (sum(theirs) / len(theirs)):.3f}" if theirs else "-"
        losses, estimates = values(mine, "loss"), values(mine, "own_estimate")
        body.append([system, len(mine), mean_sd(losses), mean_sd(estimates), mean_sd(seconds, 1), ratio])
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__, seeds=(2, 3, 4))
    options.add_argument(
        "--nanogpt", type=Path, help="a clone of karpathy/nanoGPT; not changed, but for its data folder"
    )
    options.add_argument("--updates", type=int, default=UPDATES, help="of ours; 0: the peer alone")
    options.add_argument("--peer-updates", type=int, default=2000, help="of the peer; its recipe says 2000")
    options.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # one training of ours, in this process
    given = options.parse_args()
    if given.train is not None:
        train(given.updates, given.seeds[0], given.train)
        return
    if given.nanogpt is None:
        options.error("--nanogpt: give the folder of a clone of karpathy/nanoGPT")
    nanogpt = given.nanogpt.resolve()
    prepare(nanogpt)
    results = Results(BENCH, given.out, table)
    for seed in given.seeds:
        budget = f"{given.peer_updates} updates"
        for system in ("nanoGPT", f"multistep, {given.updates} updates")[: 2 if given.updates else 1]:
            if results.has("tinyshakespeare", budget, system, seed):
                continue
            before = load_average()
            with tempfile.TemporaryDirectory(prefix="multistep-bench-") as place:
                out = Path(place) / "out"
                ran = peer(nanogpt, out, given.peer_updates) if system == "nanoGPT" else ours(given.updates, seed, out)
            threads = os.environ.get("OMP_NUM_THREADS", "default")
            results.add("tinyshakespeare", budget, system, seed, {**ran, "threads": threads}, before)


if __name__ == "__main__":
    main()
