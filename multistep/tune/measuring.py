"""The profile of a language run: lengths, the model's shape, and under a budget of time what everything costs on this machine.

A model from scratch is the largest of `RUNGS` that `weights_fit`: its tokens a second are measured, rung by rung, so that the rule
reads what this machine can do. Under budgets in updates or tokens only exact counts are read, and a run repeats bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from multistep import team
from multistep.allocation import if_it_fits
from multistep.budget import Budget
from multistep.controllers.choose import Facts, choose
from multistep.controllers.language_plan import LanguageProblem
from multistep.controllers.sizes import BATCH_TOKENS, RUNGS, SPANS_BATCH, UPDATES, dropout_for, weights_fit
from multistep.data.cells import Record
from multistep.objectives import NextToken, Seq2Seq, Span
from multistep.predictors.decoding import Greedy
from multistep.state import TrainState
from multistep.strategy import Shape, TrainWriter
from multistep.tasks.writing import LOSSES
from multistep.train import train
from multistep.tune.memory import device_memory
from multistep.tune.speakers import JUDGED_BYTES, JUDGED_ROWS, WATCHED_BYTES, Speakers
from multistep.types import UserError
from multistep.writing import sizes

LEAST_TARGETS = (
    100_000  # tokens of right answers in train: with fewer a model from scratch writes nothing worth reading
)
LENGTH_QUANTILE, LENGTH_ROOM = 0.995, 1.2  # of train's answers: how long an answer may become
JUDGE_SHARE = 0.02  # of the budget: one judgement of texts may take so much
TEST_SHARE = 0.15  # of the budget: reading the test may take so much, else a fixed sample of it is read
LEAST_BYTES, LEAST_TEST_ROWS = 20_000, 200  # that are judged whatever it costs
TRAIN_SHARE = 0.7  # of the budget: what training gets, about
PROFILE_SHARE = 0.03  # of the budget: no further rung is measured after that
COUNTED_BATCH = 3072  # tokens an update under budgets that count updates or tokens
LEAST_CONTEXT, MOST_CONTEXT = 256, 1024  # tokens of a source, or of a conversation, where nobody says
TEMPLATE_TOKENS = 32  # that a chat template adds, about
NEW_TOKENS = 200  # that a language model goes on with
_GUESSED_S = {"cpu": 1e4, "cuda": 1e6}  # tokens a second, before anything is measured
_BEYOND = 10.0  # times the speed of a product of 1,024-wide matrices: no model is faster
_CHARACTERS = 8  # of a token, at most, about
_UPDATES, _WRITTEN, _BEAMS = 4, 16, 5.0  # measured updates and texts; beams cost about so many times greedy


class Profiler:
    """`stands`: the shape of what a run that is given more has trained; it goes on with that."""

    def __init__(self, speakers: Speakers, problem: LanguageProblem, stands: Shape | None = None):
        self.s, self.problem, self.config, self.stands = speakers, problem, problem.config, stands
        self.timed = problem.unit == "seconds"
        self.lm = problem.task.kind == "lm"

    def facts(self) -> dict[str, Any]:
        s, codec = self.s, self.s.codec
        targets = [len(t) for t in codec.targets([r.targets[0] for r in s.data.train])]
        longest = int(np.quantile(targets, LENGTH_QUANTILE) * LENGTH_ROOM) + 4
        facts: dict[str, Any] = {
            "vocabulary": len(codec.tokenizer), "characters": s.characters, "target_tokens": sum(targets),
            "new_tokens": NEW_TOKENS if self.lm else min(longest, self.config.max_length or 512),
            "reads": "", "shape": None, "given": False, "why_no_model": "", "bf16": False, "tokens_s": 0.0, "look_s": 0.0,
            "judge_s": 0.0, "calibration_s": 0.0, "test_s": 0.0, "judged_rows": JUDGED_ROWS[1], "test_rows": 0,
        }  # fmt: skip
        s.facts = facts
        before = [t.text for r in s.data.train for t in r.asked if t.role == "assistant"]  # learnt from as well
        reads, name, why = self._kind(sum(targets) + sum(map(len, codec.targets(before))))
        facts |= {"reads": reads, "why_no_model": why}
        if why:
            return facts
        facts |= self._lengths(reads, name, targets)
        if reads == "prompts":  # half of the window is the prompt's at least
            facts["new_tokens"] = min(facts["new_tokens"], max(1, facts["context"] // 2))
        shape = Shape(
            reads=reads, name=name, vocabulary=facts["vocabulary"], context=facts["context"],
            lora=self.config.lora if self.config.adapter == "lora" else None,
        )  # fmt: skip
        facts |= self._sized(shape, facts) if name is None else self._measured(shape, facts)
        facts["given"] = name is not None and (reads != "spans" or s.pretrained == "encoder")
        return facts

    def _kind(self, target_tokens: int) -> tuple[Any, str | None, str]:
        """What the model reads, its name (None: from scratch), and why there is none."""
        s, task = self.s, self.problem.task
        if self.config.model == "none":
            return "", None, "--model none"
        name = self.config.model if s.pretrained else None
        if task.answers == "passage" and s.pretrained in ("", "encoder"):
            name = s.encoder_name()
            return (
                ("spans", name, "") if name else ("", None, "no pretrained encoder that knows this script is at hand")
            )
        if task.answers == "choices" and not s.pretrained:
            return "", None, "choices are ranked; a model that writes them has to be named (--model)"
        reads = "stream" if self.lm else "prompts" if s.pretrained == "decoder" or task.kind == "chat" else "pairs"
        if name is None and not self.lm and target_tokens < LEAST_TARGETS:
            few = (
                f"{target_tokens:,} tokens of right answers are too few (< {LEAST_TARGETS:,}) for a model from scratch"
            )
            return "", None, f"{few}; name a pretrained one with --model"
        return reads, name, ""

    # ------------------------------------------------------------------ lengths and batches

    def _lengths(self, reads: str, name: str | None, targets: list[int]) -> dict[str, Any]:
        s, n = self.s, len(self.s.data.train)
        wanted = self.config.max_length
        if reads == "stream":
            expected = self._tokens(0.0)
            context = wanted or (128 if expected < 1e7 else 256 if expected < 1e8 else 512)
            context = min(context, s.positions)
            return {"context": context, "row_tokens": context, "train_tokens": sum(targets)}
        if reads == "spans":
            model = s.model(Shape(reads="spans", name=name))
            if wanted and wanted > model.max_tokens:
                raise UserError(
                    f"max_length: {wanted} was given, but {name} has {model.max_tokens} positions. Give that, or less."
                )
            context = wanted or min(256, model.max_tokens)
            some = s.spans(model, Shape(reads="spans", name=name, context=context)).rows(s.data.train[:500])
            mean = some.tokens(some.taught) / max(1, len(some))
            return {"context": context, "row_tokens": mean, "train_tokens": int(mean * n * len(some) / min(n, 500))}
        sources = [len(x) for x in s.codec.whole([s.task.reads(r) for r in s.data.train])]
        both = np.add(sources, targets)
        longest = max(*sources, *targets) if reads == "pairs" else int(both.max()) + TEMPLATE_TOKENS
        context = min(wanted or min(MOST_CONTEXT, max(LEAST_CONTEXT, -(-longest // 16) * 16)), s.positions)
        row_tokens = float(np.minimum(both, 2 * context).mean())
        return {"context": context, "row_tokens": row_tokens, "train_tokens": int(both.sum())}

    def _tokens(self, tokens_s: float) -> float:
        """Tokens that training will see in all."""
        match self.problem.unit:
            case "seconds":
                return TRAIN_SHARE * self.problem.budget * (tokens_s or _GUESSED_S[self.s.device])
            case "updates":
                return self.problem.budget * COUNTED_BATCH
            case "tokens":
                return self.problem.budget

    def _batch(self, tokens: float, facts: Mapping[str, Any]) -> dict[str, Any]:
        wanted = self.config.batch_tokens or (tokens / UPDATES if self.timed else COUNTED_BATCH)
        low, high = (SPANS_BATCH if facts["reads"] == "spans" else BATCH_TOKENS[0]), BATCH_TOKENS[1]
        if self.config.batch_tokens is not None:
            low, high = 1, 10**9
        batch = min(high, max(low, wanted))
        rows = max(1, round(batch / facts["row_tokens"]))
        return {"batch_rows": rows, "batch_tokens": rows * facts["row_tokens"]}

    # ------------------------------------------------------------------ sizes

    def _sized(self, shape: Shape, facts: dict[str, Any]) -> dict[str, Any]:
        """The size of what stands, or that was asked for, or the largest rung that fits."""
        if self.stands is not None:
            return self._measured(shape.with_(width=self.stands.width, layers=self.stands.layers), facts)
        given = self.config.width, self.config.depth
        rungs = [(given[0] or 128, given[1] or 4)] if any(given) else list(RUNGS)
        best: Shape | None = None
        guessed, begun = {**facts, **self._batch(self._tokens(0.0), facts)}, time.monotonic()
        if self.timed and self.s.device == "cuda":
            return self._measured(self._from_above(rungs, shape, guessed), facts)
        for width, layers in rungs:
            if best is not None and self._over(begun):
                break
            rung = shape.with_(width=width, layers=layers)
            weights = hidden_weights(self.s.model(rung))
            speed = self._update(rung, guessed, "adamw", bf16=False) if self.timed else 0.0
            fits = weights_fit(weights, self._tokens(speed), facts["train_tokens"])
            if best is not None and not fits:
                break
            best = rung
            if not fits:
                break
        assert best is not None
        return self._measured(best, facts)

    def _from_above(self, rungs: Sequence[tuple[int, int]], shape: Shape, facts: Mapping[str, Any]) -> Shape:
        """The largest rung that fits, else the smallest. On a GPU small models take as long as those many times their size, so that
        going up would measure for longer than a short budget allows. What the data or the card cannot fill is not even made; a
        smaller model is at least as fast as a larger one that was measured."""
        bf16, different = self._precisions()[0], facts["train_tokens"]
        peak, begun = matrix_peak(self.s.device, bf16), time.monotonic()
        *larger, smallest = [shape.with_(width=width, layers=layers) for width, layers in reversed(rungs)]
        tokens = 0.0  # that the last rung would see
        for rung in larger:
            weights = 12 * rung.layers * rung.width**2  # about: tables are not counted
            if weights_fit(weights, tokens, different):
                return rung
            most = self._tokens(_BEYOND * peak / (6 * weights))
            if not weights_fit(weights, most, different):
                continue
            if self._over(begun):
                continue
            speed = if_it_fits(partial(self._update, rung, facts, "adamw", bf16))
            tokens = self._tokens(speed) if speed else 0.0
            if weights_fit(weights, tokens, different):
                return rung
        return smallest

    def _over(self, begun: float) -> bool:
        """Whether measuring sizes has taken its share."""
        return self.timed and time.monotonic() - begun > PROFILE_SHARE * self.problem.budget

    def _update(self, shape: Shape, facts: Mapping[str, Any], optimizer: str, bf16: bool) -> float:
        """Tokens (not padding) a second, of the fastest of a few updates; of a team, times its processes."""
        s, batch = self.s, max(1, facts["batch_rows"] // team.speed())  # of a team, each process takes its part
        objective = {"pairs": Seq2Seq(), "spans": Span()}.get(shape.reads, NextToken())
        settings = (
            self.config.optimizer
            if self.config.optimizer.kind != "auto"
            else self.config.optimizer.with_(kind=optimizer)
        )
        strategy = TrainWriter(
            optimizer=settings.at(1e-9), objective=objective, shape=shape, batch_size=facts["batch_rows"],
            micro_batch=self.config.micro_batch, bf16=bf16,
        )  # fmt: skip
        state = TrainState(s.model(shape))
        rows = (_UPDATES + 1) * batch
        if shape.reads == "stream":
            few = _beginning(s.data.train, rows * facts["row_tokens"] * _CHARACTERS)
        else:
            few = s.data.train[: max(64, rows)]
        data, _ = s.rows(state.model, strategy, few)
        state.begin(strategy, Budget(amount=_UPDATES, unit="updates"))
        best, before, tokens = 0.0, time.monotonic(), 0
        for measure in train(state, data, bf16=bf16):
            now = time.monotonic()
            best = max(best, (measure.tokens - tokens) / max(1e-9, now - before))
            before, tokens = now, measure.tokens
        return best * team.speed()

    def _measured(self, shape: Shape, facts: dict[str, Any]) -> dict[str, Any]:
        """The optimizer by its rules, precision, tokens a second, and what judging costs."""
        s, model = self.s, self.s.model(shape)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        hidden = sum(p.numel() for n, p in named if p.ndim == 2 and id(p) not in tables and "head" not in n)
        regime = self.problem.regime if shape.name is None or shape.lora is not None else "fine_tune"
        config, choice = choose(
            self.config.optimizer,
            Facts(regime=regime, parameters=sum(p.numel() for _, p in named), hidden=hidden, memory_bytes=device_memory(s.device)),
        )  # fmt: skip
        found: dict[str, Any] = {
            "shape": shape.model_dump(),
            "optimizer": config.kind,
            "choice": choice,
            **self._batch(self._tokens(0.0), facts),
        }
        found["weights"] = sum(p.numel() for p in model.parameters())
        found["fresh_head"] = shape.reads == "spans" and not model.head.weight.any().item()
        if not self.timed:
            shape = self._with_dropout(shape, 0.0, facts)
            found |= {"shape": shape.model_dump(), "size": self._size_in_words(shape, found["weights"], facts)}
            return found
        merged = {**facts, **found}
        speeds = {bf16: self._update(shape, merged, config.kind, bf16) for bf16 in self._precisions()}
        found["bf16"] = max(speeds, key=lambda k: speeds[k])
        found["tokens_s"] = speeds[found["bf16"]]
        matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - sum(
            p.numel() for p in model.parameters() if id(p) in tables
        )
        found |= self._batch(self._tokens(found["tokens_s"]), facts)
        if not 2 / 3 < found["batch_rows"] / merged["batch_rows"] < 3 / 2:  # another batch has another speed
            found["tokens_s"] = self._update(shape, {**facts, **found}, config.kind, found["bf16"])
        found["peak_share"] = round(
            6 * matrices * found["tokens_s"] / team.speed() / matrix_peak(s.device, found["bf16"]), 4
        )
        shape = self._with_dropout(shape, found["tokens_s"], facts)
        found["shape"] = shape.model_dump()
        found["size"] = self._size_in_words(shape, found["weights"], facts)
        s.facts = {**merged, **found}
        return {**found, **self._judging(shape, model)}

    def _with_dropout(self, shape: Shape, tokens_s: float, facts: Mapping[str, Any]) -> Shape:
        """Of a model from scratch that reads pairs, by its epochs; a decoder's class has none but in the attention."""
        if shape.name is not None or shape.reads != "pairs":
            return shape
        given = self.config.dropout if self.stands is None else self.stands.dropout
        return shape.with_(
            dropout=dropout_for(self._tokens(tokens_s) / max(1, facts["train_tokens"])) if given is None else given
        )

    def _size_in_words(self, shape: Shape, weights: int, facts: Mapping[str, Any]) -> str:
        """Of a model from scratch; "" of a pretrained one."""
        if shape.name is not None:
            return ""
        return (
            f"{shape.width} wide, {shape.layers} layers, {weights:,} weights, dropout {shape.dropout:g}, "
            f"{facts['vocabulary']:,} tokens in the vocabulary; train has {facts['train_tokens']:,} tokens"
        )

    def _precisions(self) -> tuple[bool, ...]:
        match self.config.precision:
            case "fp32":
                return (False,)
            case "bf16":
                return (True,)
            case _:
                return (True,) if self.s.device == "cuda" and torch.cuda.is_bf16_supported() else (False, True)

    def _judging(self, shape: Shape, model: Any) -> dict[str, Any]:
        """Seconds of looks, judgements, the calibration split and the test; how many rows of each are read."""
        s, rows = self.s, self.problem.rows
        few = s.records["control"][:_WRITTEN]
        if shape.reads == "spans":
            speaker: Any = s.spans(model, shape)
        else:
            speaker = s.neural(model, shape, Greedy(max_new_tokens=s.facts["new_tokens"]))
        begun = time.monotonic()
        loss_byte_s = 0.0
        if shape.reads != "spans":
            some = s.judged("control", texts=False)[:200]
            speaker.losses(some, s.data.stream)
            loss_byte_s = (time.monotonic() - begun) / max(1, int(sizes(some).sum()))
        by_texts = self.problem.metric not in LOSSES
        write_s = 0.0
        if by_texts:
            begun = time.monotonic()
            speaker.write(few)
            typical = (s.facts["target_tokens"] / max(1, rows["train"]) + 4) / s.facts["new_tokens"]
            write_s = (time.monotonic() - begun) / len(few) * (1.0 if shape.reads == "spans" else min(1.0, typical))
        budget = self.problem.budget
        most = int(min(JUDGED_ROWS[1], max(JUDGED_ROWS[0], JUDGE_SHARE * budget / max(1e-9, write_s))))
        affordable = int(JUDGE_SHARE * budget / max(1e-12, loss_byte_s))
        judged_bytes = min(JUDGED_BYTES, max(LEAST_BYTES, affordable))
        loss_s = loss_byte_s * min(judged_bytes, self.problem.bytes["control"])
        judge_s = min(most, len(s.judges["control"])) * write_s + loss_s if by_texts else loss_s
        a_row = self.problem.bytes["test"] / max(1, rows["test"]) * loss_byte_s  # of test: its loss, and its text
        a_row += (_BEAMS if shape.reads == "pairs" else 1.0) * write_s
        test_rows = min(rows["test"], max(LEAST_TEST_ROWS, int(TEST_SHARE * budget / max(1e-12, a_row))))
        return {
            "look_s": loss_byte_s * min(WATCHED_BYTES, judged_bytes, self.problem.bytes["control"]), "judge_s": judge_s,
            "judged_rows": most, "judged_bytes": judged_bytes, "test_rows": test_rows, "test_s": test_rows * a_row,
            "calibration_s": min(most, rows["calibration"]) * write_s if by_texts else loss_s,
        }  # fmt: skip


def hidden_weights(model: nn.Module) -> int:
    """Weights outside of tables of embeddings."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


def _beginning(records: Sequence[Record], characters: float) -> list[Record]:
    """The first records that have so many characters together, or all."""
    found, count = [], 0
    for record in records:
        if count >= characters:
            break
        found.append(record)
        count += len(record.targets[0])
    return found


def matrix_peak(device: str, bf16: bool) -> float:
    """FLOP a second of a product of two square matrices, 1,024 wide, in the precision given: the best of a few."""
    a = torch.randn(1024, 1024, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(5):
        begun = time.monotonic()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.monotonic() - begun)
    return 2 * 1024**3 / best
