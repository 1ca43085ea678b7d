"""Pens (generate.py): what writes in place of our engine's own settings. CTranslate2, and our engine with threads, batch or lookup.

CTranslate2 writes greedily and by beam search. It draws random numbers that no seed brings back, so it does not sample here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from multistep.codec import Codec
from multistep.engines.converted import POSITIONS, convert, vocabulary_of
from multistep.engines.runtime import Runtime, check_installed, fingerprint, lacks, made
from multistep.evaluate import on_threads
from multistep.generate import BATCH, Decode, Written, generate, stopped
from multistep.lookup import look_up
from multistep.models.step import stepper_of
from multistep.predictors.decoding import Beam, Decoding, Greedy, Sample
from multistep.predictors.ways import plain
from multistep.types import UserError
from multistep.writing import Neural

GUESSES = 6  # tokens of a lookup


def writer_variants(model: Neural) -> list[Runtime]:
    """What this model could write with here, under its decoding."""
    found = [Runtime()]
    if isinstance(plain(model.decoding), Greedy):
        found.append(Runtime(lookup=GUESSES))
    if model.device == "cpu" and not lacks(Runtime(runtime="ctranslate2")) and not refusal(plain(model.decoding)):
        found += [Runtime(runtime="ctranslate2"), Runtime(runtime="ctranslate2", dtype="int8")]
    return found


def prepare_writer(model: Neural, runtime: Runtime, folder: Path, make: bool) -> Neural:
    match runtime.runtime, runtime.dtype:
        case "torch", "fp32":
            if runtime.lookup and not isinstance(plain(model.decoding), Greedy):
                raise UserError(f"{runtime.name}: lookup is for greedy writing, not for {plain(model.decoding).kind}.")
            return replace(model, pen=OwnPen(model.model, runtime), cut={})
        case "ctranslate2", "fp32" | "int8":
            check_installed(runtime)
            if model.decoding == (decoding := plain(model.decoding)):
                check_decoding(decoding)
            if runtime.lookup:
                raise UserError(f"{runtime.name}: lookup is a part of the runtime torch. Leave it out.")
            return replace(model, pen=_ctranslate2(model, runtime, folder, make), cut={})
    known = ", ".join(r.name for r in writer_variants(model))
    raise UserError(f"{runtime.name}: no engine for a model that writes. Known: {known}.")


@dataclass
class OwnPen:
    """Our engine on torch, with its own threads, batch and lookup."""

    model: Any
    runtime: Runtime

    def write(
        self, prompts: Sequence[np.ndarray], decoding: Decoding, end_ids: Sequence[int], decode: Decode | None = None,
        watch: Callable[[float], None] | None = None,
    ) -> list[Written]:  # fmt: skip
        with on_threads(self.runtime.threads):
            if not self.runtime.lookup:
                batch = self.runtime.batch or BATCH
                return generate(self.model, prompts, decoding, end_ids, decode=decode, batch=batch, watch=watch)
            if not isinstance(decoding, Greedy):
                raise UserError(f"{self.runtime.name}: lookup is for greedy writing, not for {decoding.kind}.")
            stepper, found = stepper_of(self.model), []
            for prompt in prompts:
                found.append(look_up(stepper, prompt, decoding, end_ids, self.runtime.lookup, decode)[0])
                if watch is not None:
                    watch(len(found) / len(prompts))
            return found

    def can(self, decoding: Decoding) -> bool:
        return not self.runtime.lookup or isinstance(decoding, Greedy)


# ---------------------------------------------------------------------------------------------- CTranslate2


def refusal(decoding: Decoding) -> str:
    """Why CTranslate2 does not write so; empty where it does."""
    if isinstance(decoding, Sample):
        return "it draws random numbers that no seed brings back"
    if isinstance(decoding, Beam) and decoding.stop:
        return "it has no stop texts with beams"
    return ""


def check_decoding(decoding: Decoding) -> None:
    if why := refusal(decoding):
        raise UserError(f"ctranslate2: no writing by {decoding.kind}: {why}. Use the runtime torch, or greedy.")


def _ctranslate2(model: Neural, runtime: Runtime, folder: Path, make: bool) -> CTranslate2Pen:
    def write(into: Path) -> None:
        convert(model.model, model.codec, into, runtime.dtype == "int8")

    place = made(folder, runtime, fingerprint(model.model), write if make else None)
    return open_pen(place, model.codec, model.model.config, runtime)


def open_pen(place: Path, codec: Codec, config: Any, runtime: Runtime) -> CTranslate2Pen:
    """The pen of a converted model. `config`: that of the model in transformers. Raises UserError where the files are damaged."""
    import ctranslate2

    kind = ctranslate2.Translator if config.is_encoder_decoder else ctranslate2.Generator
    try:
        model = kind(
            str(place), device="cpu", compute_type="int8_float32" if runtime.dtype == "int8" else "float32",
            inter_threads=1, intra_threads=runtime.n_threads,
        )  # fmt: skip
        tokens = vocabulary_of(place)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"{place}: CTranslate2 cannot read it ({reason}). Make it again.") from None
    positions = getattr(config, "max_position_embeddings", None)
    if config.model_type == "m2m_100":
        positions = max(POSITIONS, positions or 0)
    return CTranslate2Pen(
        model, tokens, config.is_encoder_decoder, positions if config.is_encoder_decoder else None, runtime
    )


@dataclass
class CTranslate2Pen:
    """`model`: a Translator or a Generator; `tokens`: by id; `positions`: of a text at most, where there is a limit."""

    model: Any
    tokens: list[str]
    reads_source: bool
    positions: int | None
    runtime: Runtime

    def __post_init__(self) -> None:
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    def can(self, decoding: Decoding) -> bool:
        return not refusal(decoding)

    def write(
        self, prompts: Sequence[np.ndarray], decoding: Decoding, end_ids: Sequence[int], decode: Decode | None = None,
        watch: Callable[[float], None] | None = None,
    ) -> list[Written]:  # fmt: skip
        check_decoding(decoding)
        if any(len(p) == 0 for p in prompts):
            raise ValueError("write: a prompt has no token; give at least the begin token")
        longest = max([decoding.max_new_tokens, *map(len, prompts)])
        if self.positions is not None and longest > self.positions:
            raise UserError(f"ctranslate2: {longest} tokens are more than the model's {self.positions} positions.")
        found = [Written() for _ in prompts]
        order, size = np.argsort([len(p) for p in prompts], kind="stable"), self.runtime.batch or BATCH
        for start in range(0, len(order), size):
            part = order[start : start + size]
            rows = [[self.tokens[t] for t in prompts[i]] for i in part]
            for i, written in zip(part, self._some(rows, decoding, end_ids, decode), strict=True):
                found[int(i)] = written
            if watch is not None:
                watch(min(1.0, (start + size) / len(order)))
        return found

    def _some(
        self, rows: list[list[str]], decoding: Decoding, end_ids: Sequence[int], decode: Decode | None
    ) -> list[Written]:
        stop = _Stop(len(rows), decoding, set(end_ids), decode) if decoding.stop and decode is not None else None
        how: dict[str, Any] = {
            "beam_size": 1, "length_penalty": 1.0, "repetition_penalty": decoding.repetition_penalty,
            "no_repeat_ngram_size": decoding.no_repeat_ngram, "return_scores": True, "max_batch_size": len(rows),
            "end_token": [self.tokens[t] for t in end_ids],
        }  # fmt: skip
        if isinstance(decoding, Beam):
            how |= {"beam_size": decoding.beams, "length_penalty": decoding.length_penalty}
        if stop is not None:
            how["callback"] = stop
        longest, least = decoding.max_new_tokens, decoding.min_new_tokens
        if not end_ids:  # the library always has an end token; nothing ends a text that has none
            least = longest
        if self.reads_source:
            done = self.model.translate_batch(
                rows, max_input_length=0, max_decoding_length=longest, min_decoding_length=least, **how
            )
            texts = [([self._ids[t] for t in r.hypotheses[0]], r.scores[0]) for r in done]
        else:
            done = self.model.generate_batch(
                rows, max_length=longest, min_length=least, include_prompt_in_result=False, **how
            )
            texts = [(list(r.sequences_ids[0]), r.scores[0]) for r in done]
        if stop is not None:
            return stop.written()
        ends = set(end_ids)
        return [
            Written([i for i in ids if i not in ends], float(score), len(ids) < longest or bool(ends & set(ids[-1:])))
            for ids, score in texts
        ]


class _Stop:
    """Reads along while greedy texts are written, and ends those in which a stop text has come."""

    def __init__(self, rows: int, decoding: Decoding, ends: set[int], decode: Decode | None):
        self.decoding, self.ends, self.decode = decoding, ends, decode
        self.rows = [Written() for _ in range(rows)]

    def __call__(self, step: Any) -> bool:
        written = self.rows[step.batch_id]
        if written.ended:
            return True
        written.score += step.log_prob
        if step.token_id in self.ends:
            written.ended = True
            return True
        written.ids.append(step.token_id)
        return stopped(written, self.decoding, self.decode)

    def written(self) -> list[Written]:
        for row in self.rows:
            row.score /= max(1, len(row.ids) + row.ended)
        return self.rows
