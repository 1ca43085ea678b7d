"""Greedy writing: our engine against transformers' `model.generate`, in turns, on the same prompts; the tokens have to be the same.

    stories260k    the published tiny Llama, vocabulary 512 (--stories: the folder of its files)
    llama          4 layers, 128 wide, vocabulary 6,000, random weights
    m2m100         4 + 4 layers, 128 wide, vocabulary 6,000, random weights: what `fit --task translate` trains

Batches of 16, 64 new tokens, none of which ends a text. Medians over turns of tokens a second.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _common import Results, Row, load_average, markdown, mean_sd, parser, select, values
from multistep.generate import generate
from multistep.models.decoder import load_decoder, new_decoder
from multistep.models.llama2c import convert
from multistep.models.seq2seq import new_seq2seq
from multistep.predictors.decoding import Greedy

BENCH = "generation"
ROWS, PROMPT, NEW, TURNS = 16, 20, 64, 5
IDS = {"pad": 0, "bos": 1, "eos": 2}


def model_of(name: str, seed: int, stories: Path | None) -> Any:
    if name == "llama":
        return new_decoder(6000, 128, 4, 256, IDS, seed)
    if name == "m2m100":
        return new_seq2seq(6000, 128, 4, 256, IDS, seed)
    assert stories is not None
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        convert(stories / "stories260K.bin", stories / "tok512.bin", Path(folder) / "model")
        return load_decoder(Path(folder) / "model")


@torch.no_grad()
def run(name: str, seed: int, stories: Path | None) -> Row:
    model = model_of(name, seed, stories).eval()
    prompts_BT = np.random.default_rng(seed).integers(5, model.config.vocab_size - 1, size=(ROWS, PROMPT))
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 1}
    model.generation_config.eos_token_id = None  # no text ends before its length

    def theirs() -> list[list[int]]:
        ids = torch.from_numpy(prompts_BT)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return found[:, 1 if model.config.is_encoder_decoder else PROMPT :].tolist()

    def ours() -> list[list[int]]:
        return [w.ids for w in generate(model, list(prompts_BT), Greedy(max_new_tokens=NEW), [], batch=ROWS)]

    speeds: dict[str, list[float]] = {"theirs": [], "ours": []}
    texts: dict[str, list[list[int]]] = {}
    for turn in range(TURNS + 1):
        for which, write in (("theirs", theirs), ("ours", ours)) if turn % 2 else (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            texts[which] = write()
            if turn:  # the first one warms up
                speeds[which].append(ROWS * NEW / (time.perf_counter() - start))
    same = sum(a == b for a, b in zip(texts["theirs"], texts["ours"], strict=True))
    found = {k: round(statistics.median(v)) for k, v in speeds.items()}
    return {
        "ok": True,
        **found,
        "ratio": round(found["ours"] / found["theirs"], 3),
        "same_rows": same,
        "threads": torch.get_num_threads(),
    }


def table(rows: list[Row]) -> str:
    head = [
        "model",
        "runs",
        "model.generate, tokens/s",
        "ours, tokens/s",
        "ratio",
        f"rows with the same tokens, of {ROWS}",
    ]
    body = []
    for name in dict.fromkeys(r["system"] for r in rows):
        mine = select(rows, system=name)
        speeds = [mean_sd(values(mine, k), 0) for k in ("theirs", "ours")]
        body.append([name, len(mine), *speeds, mean_sd(values(mine, "ratio"), 2), min(values(mine, "same_rows"))])
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--stories", type=Path, help="the folder of stories260K.bin and tok512.bin; without it that model is left out"
    )
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    for name in ("stories260k", "llama", "m2m100"):
        for seed in given.seeds:
            if (name != "stories260k" or given.stories) and not results.has("-", f"{NEW} tokens", name, seed):
                before = load_average()
                results.add("-", f"{NEW} tokens", name, seed, run(name, seed, given.stories), before)


if __name__ == "__main__":
    main()
