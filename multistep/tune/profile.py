"""What a run measures before it plans: lengths of its texts, speed of the encoder on this machine, and the optimizer that follows."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from multistep import team
from multistep.allocation import if_it_fits
from multistep.budget import Budget
from multistep.config import OptimizerConfig
from multistep.controllers.choose import Facts, choose
from multistep.controllers.plan import LENGTHS as CUTS
from multistep.evaluate import Rows, encode
from multistep.optimizers.muon import hidden_matrices
from multistep.state import TrainState
from multistep.strategy import FineTune, Profile, Trial
from multistep.subwords import encode_ids
from multistep.train import train
from multistep.tune.actions import Bench, Run
from multistep.tune.memory import device_memory
from multistep.tune.workbench import Workbench
from multistep.types import Cost, Outcome

LENGTHS = (32, 64, 128, 256, 512)
_PROFILE_LENGTH = 128  # tokens; longer texts are cut for the measurement of speed
# Updates of training on a GPU in each precision, the first ones of which are not timed; seconds after which no more are made.
_UPDATES, _WARM, _TRAINED_S = 12, 4, 2.0


def run_profile(bench: Bench, trial: Trial, action: Profile) -> Run:
    """Lengths, tokens at every truncation, and the speed of the encoder in fp32 and bf16."""
    started = time.monotonic()
    work = bench.work
    rows = {k: len(v) for k, v in work.texts.items()}
    characters = {k: sum(map(len, v)) for k, v in work.texts.items()}
    facts: dict[str, Any] = {"rows": rows, "characters": characters, "device": work.device, "encoder": "none"}
    # A run that is given more goes on with the encoder that it began with, whatever the hub says today.
    facts["why_no_encoder"] = "" if work.has_encoder else work.find_encoder()
    if work.config.model != "none" and not work.has_encoder:
        work.start_from_scratch()
    if work.has_encoder:
        assert work.tokenizer is not None
        reads = _reads(work)
        sample = work.texts["train"][:: max(1, rows["train"] // 1000)]
        lengths = np.array([len(i) for i in encode_ids(work.tokenizer, sample, reads)[0]])
        per_character = {n: float(np.minimum(lengths, n).sum()) / max(1, len(lengths)) for n in LENGTHS}
        facts |= {
            "encoder": work.scratch or str(work.source),
            "mean_tokens": per_character,  # tokens a row at each truncation
            "p95_tokens": float(np.percentile(lengths, 95)),
            "n_layers": work.encoder().n_layers,
            "hidden": work.base().width,
        }
        chosen, facts["optimizer"] = _optimizer(work)
        at_most = work.config.max_length or min((n for n in CUTS if n >= facts["p95_tokens"]), default=CUTS[-1])
        facts |= _throughput(bench, lengths, min(_PROFILE_LENGTH, reads), chosen, min(at_most, reads))
        if (together := team.speed()) > 1:
            facts["processes"] = together
        bench.bf16 = facts["precision"] == "bf16"
        yield "Noted", {"trial": trial.id, "what": "optimizer", "facts": facts["optimizer"]}
    yield "Noted", {"trial": trial.id, "what": "profiled", "facts": facts}
    return Outcome(facts=facts, cost=Cost(wall_s=time.monotonic() - started))


def _reads(work: Workbench) -> int:
    """The longest truncation that the encoder has positions for. Raises UserError where it was asked for more than those."""
    positions = work.base().positions
    return LENGTHS[-1] if positions is None else max((n for n in LENGTHS if n <= positions), default=positions)


def _optimizer(work: Workbench) -> tuple[OptimizerConfig, dict[str, Any]]:
    """The optimizer that will train the encoder; its settings, and the rule that chose it."""
    named = [(n, p) for n, p in work.encoder().named_parameters() if not n.startswith("backbone.pooler.")]
    hidden = hidden_matrices([(n, p.ndim) for n, p in named])
    chosen, rule = choose(
        work.config.optimizer,
        Facts(
            regime="scratch" if work.scratch else "fine_tune",
            parameters=sum(p.numel() for _, p in named),
            hidden=sum(p.numel() for n, p in named if n in hidden),
            rows=len(work.texts["train"]),
            memory_bytes=device_memory(work.device),
        ),
    )
    return chosen, {"settings": {k: v for k, v in chosen.model_dump().items() if v is not None}, "rule": rule}


def _throughput(
    bench: Bench, lengths: np.ndarray, longest: int, optimizer: OptimizerConfig, length: int
) -> dict[str, Any]:
    """Tokens a second of the forward pass, in fp32 and bf16 where that may be used, on a batch of typical length; on a GPU of training
    as well, by `optimizer`, with texts cut at `length`."""
    work, wanted = bench.work, bench.work.config.precision
    assert work.tokenizer is not None
    if not bench.timed() and wanted == "auto":  # a measurement would make the run depend on the machine's mood
        return {"precision": "bf16" if work.device == "cuda" else "fp32", "forward_tokens_s": 0.0}
    typical = max(1, int(np.median(np.minimum(lengths, longest))))
    texts, model = sorted(work.texts["train"][:4000], key=len), work.encoder()
    count = min(len(texts), max(1, model.tokens_at_once() // typical))
    middle = texts[max(0, (len(texts) - count) // 2) :][:count]
    ids, _ = encode_ids(work.tokenizer, middle, longest)
    rows = Rows(ids, work.pad_id, work.device)
    few = rows.subset(np.arange(min(8, count)))
    speed: dict[str, float] = {}
    outputs: dict[str, np.ndarray] = {}
    known = ("fp32", "bf16") if model.in_bf16 else ("fp32",)
    for name in known if wanted == "auto" else (wanted,):
        # The first calls set up threads and, on a GPU, load kernels for every shape: once that took 8 s for one batch.
        encode(model, rows if work.device == "cuda" else few, bf16=name == "bf16")
        for _ in range(2):
            t = time.monotonic()
            outputs[name] = encode(model, rows, bf16=name == "bf16")
            speed[name] = max(speed.get(name, 0.0), int(rows.lengths_N.sum()) / (time.monotonic() - t))
            if speed[name] < 0.7 * max(speed.values()):
                break  # far behind: once is enough
    best = max(speed, key=lambda k: speed[k])
    agreement = 1.0
    if len(outputs) == 2:
        a, b = outputs["fp32"], outputs["bf16"]
        agreement = float(np.min((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1) + 1e-12)))
        if best == "bf16" and agreement < 0.999:
            best = "fp32"
    facts: dict[str, Any] = {"tokens_s": {k: round(v) for k, v in speed.items()}, "agreement": agreement}
    # On a GPU small batches wait for their kernels to be launched, which no forward pass on a large one says.
    if work.device == "cuda" and bench.timed():
        del model
        names = speed if agreement >= 0.999 else (best,)
        training = {name: _training(work, name == "bf16", optimizer, length) for name in names}
        facts["trained_tokens_s"] = {k: round(v) for k, v in training.items()}
        if any(training.values()):
            best = max(training, key=lambda k: training[k])
            facts["train_tokens_s"] = training[best]
    return {"precision": best, "forward_tokens_s": speed[best], **facts}


def _training(work: Workbench, bf16: bool, optimizer: OptimizerConfig, length: int) -> float:
    """Tokens (not padding) a second of training all layers, in batches and at a length as they will be; 0 where there is no memory for
    that: fewer layers may fit."""
    return if_it_fits(lambda: _timed_updates(work, bf16, optimizer, length))


def _timed_updates(work: Workbench, bf16: bool, optimizer: OptimizerConfig, length: int) -> float:
    assert work.tokenizer is not None
    size = max(1, work.config.batch_size // team.speed())  # of a team, each process takes its part
    texts = work.texts["train"]
    ids, _ = encode_ids(work.tokenizer, texts[:: max(1, len(texts) // (size * _UPDATES))], length)
    rows = Rows(ids, work.pad_id, work.device, torch.zeros(len(ids), dtype=torch.long))
    strategy = FineTune(
        trains="all", optimizer=optimizer.at(1e-9), batch_size=size, micro_batch=work.config.micro_batch, bf16=bf16
    )
    state = TrainState(work.encoder())
    state.begin(strategy, Budget(amount=_UPDATES, unit="updates"))
    tokens, since = [0], [time.monotonic()]
    for measure in train(state, rows, bf16=bf16):
        if measure.event == "out of memory":  # it comes again in smaller parts
            continue
        tokens.append(measure.tokens)
        since.append(time.monotonic())
        if len(since) > _WARM + 1 and since[-1] - since[0] > _TRAINED_S:
            break
    return (tokens[-1] - tokens[_WARM]) / (since[-1] - since[_WARM])
