"""Tasks whose answer is a text: `multistep fit` on each, as a user would run it; the test is read once, by the run.

    multi30k          translation en-de from scratch, 15 min                          (--problems multi30k_45m: 45 min)
    shakespeare       characters, 5 min, any architecture; nats a character on nanoGPT's validation split, which is the test here
    scitldr, aeslc    summaries, 10 min
    cmrc2018          answers from passages, Chinese, 10 min; xquad_en: English
    alpaca_zh, gsm8k  conversations: LoRA beside stories260K, 5 min (--stories: the folder of its files); `given` is what the model
                      gives before, on control, and both adapted models, folded in and beside, write the first prompts

Rows hold the test's metrics with their errors, what stands in the end, the first writers that were tried, on control, and of summaries
and answers what the same test rows give to the rivals of rivals.py, paired.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from _common import ROOT, Results, Row, data_folder, load_average, markdown, mean_sd, multistep, parser, select, values
from multistep import load
from multistep.data.records import load_language
from rivals import compared

BENCH = "language"


class Problem(NamedTuple):
    dataset: str
    budget: str
    task: str
    metric: str
    options: tuple[str, ...] = ()


PROBLEMS = {
    "multi30k": Problem("multi30k_en_de", "900s", "translate", "bleu"),
    "multi30k_45m": Problem("multi30k_en_de", "2700s", "translate", "bleu"),
    "shakespeare": Problem("tinyshakespeare", "300s", "lm", "bits_per_byte"),
    "scitldr": Problem("scitldr_a", "600s", "summarize", "rougeL"),
    "aeslc": Problem("aeslc", "600s", "summarize", "rougeL"),
    "cmrc2018": Problem("cmrc2018", "600s", "answer", "f1"),
    "xquad_en": Problem("xquad_en", "300s", "answer", "f1"),
    "alpaca_zh": Problem("alpaca_zh", "300s", "chat", "bits_per_byte", ("--adapter", "lora")),
    "gsm8k": Problem("gsm8k", "300s", "chat", "bits_per_byte", ("--adapter", "lora")),
}


def source(problem: Problem, place: Path) -> Path:
    """The dataset's folder; of tinyshakespeare one whose test split is nanoGPT's validation split."""
    folder = data_folder(problem.dataset)
    if problem.dataset != "tinyshakespeare":
        return folder
    made = place / "data"
    made.mkdir()
    shutil.copy(folder / "train.jsonl.gz", made / "train.jsonl.gz")
    shutil.copy(folder / "validation.jsonl.gz", made / "test.jsonl.gz")
    return made


def run(name: str, seed: int, stories: Path | None, journals: Path) -> Row:
    problem = PROBLEMS[name]
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        place = Path(folder)
        out, data = place / "run", source(problem, place)
        options = list(problem.options)
        if problem.task == "chat":
            from multistep.models.llama2c import convert

            if stories is None:
                raise SystemExit(f"benchmarks: {name} needs --stories, the folder of stories260K")
            convert(stories / "stories260K.bin", stories / "tok512.bin", place / "stories")
            options += ["--model", str(place / "stories")]
        limit_s = 2 * float(problem.budget.removesuffix("s")) + 300
        ran = multistep(
            "fit", str(data), "--task", problem.task, "--metric", problem.metric, "--budget", problem.budget,
            "--seed", str(seed), "--out", str(out), *options, limit_s=limit_s, cache=place / "cache",
        )  # fmt: skip
        if (out / "journal.jsonl").exists():
            journals.mkdir(parents=True, exist_ok=True)
            text = (out / "journal.jsonl").read_text(encoding="utf-8")
            for here, said in (
                (str(data), f"DATA/{problem.dataset}"),
                (folder, "TMP"),
                (sys.prefix, "PREFIX"),
                (str(ROOT), "."),
            ):
                text = text.replace(here, said)  # what is published names no folder of this machine
            (journals / f"{name}-{problem.budget}-{seed}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        if ran.status:
            return {"ok": False, "status": ran.status, "wall_s": round(ran.wall_s, 2), "error": ran.stderr}
        records = [json.loads(line) for line in (out / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
        info = json.loads((out / "model" / "multistep.json").read_text(encoding="utf-8"))
        row: Row = {"ok": True, "wall_s": round(ran.wall_s, 2), "stands": info["standing"]["kind"]}
        row |= {"decoding": (info["standing"].get("decoding") or {}).get("kind")}
        metrics: dict[str, Any] = ran.payload["metrics"]
        row["metrics"] = {k: [v["value"], v["stderr"]] for k, v in metrics.items()}
        row["value"], row["stderr"] = row["metrics"][problem.metric]
        if name == "shakespeare":
            row["nats_a_character"] = row["metrics"]["bits_per_byte"][0] * math.log(
                2
            )  # every character is a byte there
        told = {r["trial"]: r["outcome"] for r in records if r["kind"] == "Told"}
        asked = {r["trial"]["id"]: r["trial"]["action"] for r in records if r["kind"] == "Asked"}
        row["writers"] = {
            f"{asked[k]['writer']} {asked[k]['count'] or ''}".strip(): o["metrics"].get(problem.metric, [None])[0]
            for k, o in told.items() if asked[k]["kind"] == "fit_writer"
        }  # fmt: skip
        trained = [o["facts"]["tokens_s"] for o in told.values() if "tokens_s" in o["facts"] and o["cost"]["updates"]]
        row["tokens_s"] = round(trained[0]) if trained else None  # not padding, looks at validation included
        row["updates"] = sum(o["cost"]["updates"] for o in told.values())
        if problem.task in ("summarize", "answer"):
            names = ["rouge1", "rouge2", "rougeL"] if problem.task == "summarize" else ["exact_match", "f1"]
            row["rivals"] = compared(problem.task, names, data, out, seed)
        if problem.task == "chat":
            given = [o for k, o in told.items() if asked[k]["kind"] == "as_given"]
            row["given"] = given[0]["metrics"][problem.metric] if given else None
            row["adapter_writes_the_same"] = same_tokens(place / "stories", out, data)
        return row


def same_tokens(base: Path, out: Path, data: Path) -> bool | None:
    """Whether the model with its adapter folded in and the base with the adapter beside write the same tokens, greedily, for the first
    prompts of the test; None where no adapted model stands."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not (out / "model" / "adapter").exists():
        return None
    speaker: Any = load(out).language.speaker
    prompts = speaker.prompts(load_language(data, task="chat").test[:16])
    models: tuple[Any, ...] = (
        AutoModelForCausalLM.from_pretrained(out / "model"),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "model" / "adapter"),
    )
    found = [
        [m.eval().generate(torch.tensor(p[None]), max_new_tokens=40, do_sample=False).tolist() for p in prompts]
        for m in models
    ]
    return found[0] == found[1]


def table(rows: list[Row]) -> str:
    head = [
        "problem",
        "budget",
        "runs",
        "metric",
        "test ± sd over seeds (one run: ± its bootstrap error)",
        "stands",
        "updates",
        "whole process, s",
        "also",
    ]
    body = []
    for name in PROBLEMS:
        mine = select(rows, system=name)
        if not mine:
            continue
        found = values(mine, "value")
        said = mean_sd(found) if len(found) > 1 else f"{found[0]:.4f} ± {mine[0]['stderr']:.4f}"
        also = ", ".join(f"{k} {v[0]:.4f}" for k, v in mine[-1]["metrics"].items() if k != PROBLEMS[name].metric)
        if "nats_a_character" in mine[0]:
            also += f", nats a character {mean_sd(values(mine, 'nats_a_character'))}"
        kinds = ", ".join(sorted({f"{r['stands']} ({r['decoding']})" if r["decoding"] else r["stands"] for r in mine}))
        spent = [
            mean_sd(values(mine, "updates"), 0),
            mean_sd(values(mine, "tokens_s"), 0),
            mean_sd(values(mine, "wall_s"), 1),
        ]
        body.append([name, PROBLEMS[name].budget, len(mine), PROBLEMS[name].metric, said, kinds, *spent, also])
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__, seeds=(0,))
    options.add_argument(
        "--problems", nargs="+", choices=list(PROBLEMS), default=[p for p in PROBLEMS if p != "multi30k_45m"]
    )
    options.add_argument("--stories", type=Path, help="the folder of stories260K.bin and tok512.bin")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    for name in given.problems:
        for seed in given.seeds:
            p = PROBLEMS[name]
            if not results.has(p.dataset, p.budget, name, seed):
                before = load_average()
                results.add(
                    p.dataset, p.budget, name, seed, run(name, seed, given.stories, results.folder / "journals"), before
                )


if __name__ == "__main__":
    main()
