"""A bundle that writes, behind the server: texts and conversations in, texts out, many requests at once.

`predict` gives what `LanguageBundle.predict` gives for the same texts. `begin` writes for /v1, which streams tokens: the decoding that
was tuned, changed where a request asks for it; of a way that wraps another (a vote, minimum Bayes risk) the innermost one.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from multistep import dialogue
from multistep.data.cells import Record, Turn
from multistep.generate import request_number
from multistep.language_bundle import LanguageBundle
from multistep.models.mixed import Mixture
from multistep.other_writers import Counted, Mixed
from multistep.predictors.decoding import Decoding, obeyed
from multistep.predictors.ways import plain
from multistep.serve.limits import Refused, Settings
from multistep.serve.numbers import Numbers
from multistep.serve.openai import Wanted
from multistep.serve.queue import Batcher, Waits, plainly
from multistep.serve.writer import Asking, Writer, Writing
from multistep.types import Prediction, UserError
from multistep.writing import Neural

T = TypeVar("T")


class Language:
    """`writes`: whether it writes token by token, so that /v1 can be answered; `converses`: whether it takes turns."""

    def __init__(self, bundle: LanguageBundle, settings: Settings, numbers: Numbers):
        self._bundle, self._settings, self._numbers = bundle, settings, numbers
        speaker = bundle.speaker
        self._neural = (
            speaker.neural if isinstance(speaker, Mixed) else speaker if isinstance(speaker, Neural) else None
        )
        self.writes = self._neural is not None
        self.converses = self._neural is not None and self._neural.reads == "prompts"
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")  # tokenizes
        self._batcher: Batcher[Record, Prediction] | None = None
        self._writer: Writer | None = None
        neural = self._neural
        if neural is None or neural.pen is not None or neural.decoding != plain(neural.decoding):
            # What counts draws the random numbers of a place in a batch: each text is alone in its own.
            most = 1 if isinstance(speaker, Counted) else settings.batch
            self._batcher = Batcher[Record, Prediction](bundle.answer, most, settings.queue, numbers)
        if neural is None:
            return
        neural.model.eval()
        model, self._ends, self._tuned = neural.model, (neural.codec.eos,), plain(neural.decoding)
        if isinstance(speaker, Mixed):
            model = Mixture(neural.model, speaker.counted.ngram, neural.codec.tokenizer, speaker.share)
        else:
            ends, self._tuned = neural.endings()
            self._ends = tuple(ends)
        self._writer = Writer(model, neural.codec.text, settings.batch, settings.queue, numbers)

    @property
    def _queues(self) -> list[Batcher[Record, Prediction] | Writer]:
        return [q for q in (self._batcher, self._writer) if q is not None]

    @property
    def waiting(self) -> int:
        return sum(q.waiting for q in self._queues)

    def arrives(self, change: int) -> None:
        for q in self._queues:
            q.arriving += change

    def close(self) -> None:
        for q in self._queues:
            q.close()
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def _read(self, function: Callable[[], T]) -> T:
        """Run what tokenizes in a thread of its own. What a text may not be becomes a 422."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, function)
        except UserError as error:
            raise Refused(422, str(error)) from None

    # ------------------------------------------------------------------ /predict

    async def predict(self, texts: Sequence[str], seconds: float, waits: Waits = plainly) -> list[Prediction]:
        records = await self._read(lambda: self._bundle.records(texts))
        neural, writer = self._neural, self._writer
        if self._batcher is not None or neural is None or writer is None:
            assert self._batcher is not None
            return await self._batcher.ask(records, seconds, waits)
        prompts = await self._read(lambda: neural.prompts(records))
        strip = neural.task.writes
        askings = [Asking(p, self._tuned, self._ends, request_number(p), (), strip) for p in prompts]
        self._check(askings)
        found = await finished(writer.ask(askings), seconds, waits)
        self._count(askings, sum(len(said.written.ids) for said in found))
        return [neural.said(said.written) for said in found]

    def _check(self, askings: Sequence[Asking]) -> None:
        if any(len(a.prompt) == 0 for a in askings):
            raise Refused(422, "a text has no token that the model knows; send another.")

    def _count(self, askings: Sequence[Asking], written: int) -> None:
        self._numbers.tokens(sum(len(a.prompt) for a in askings), written)

    # ------------------------------------------------------------------ /v1

    async def begin(self, asked: Wanted) -> tuple[Writing, int]:
        """Begin to write what a request asks for; how many tokens were read. Raises Refused."""
        neural, writer = self._neural, self._writer
        if neural is None or writer is None:
            raise Refused(
                422, "this bundle does not write token by token; use POST /predict.", code="unsupported_model"
            )
        if asked.turns and not self.converses:
            message = "this bundle does not take turns; use POST /v1/completions, or fit one with --task chat."
            raise Refused(422, message, code="unsupported_model")
        decoding = _obeyed(self._tuned, asked, self._settings.max_tokens)
        prompts = await self._read(lambda: self._prompts(neural, asked, decoding))
        first = secrets.randbelow(2**31 - asked.n) if asked.seed is None else 0
        strip = neural.task.writes and (bool(asked.turns) or neural.reads == "pairs")
        askings = [
            Asking(prompt, decoding, self._ends, first + choice, (*asked.stops, *decoding.stop), strip)
            for prompt in prompts
            for choice in range(asked.n)
        ]
        self._check(askings)
        read = sum(len(p) for p in prompts)
        return writer.ask(askings, asked.stream), read

    def _prompts(self, neural: Neural, asked: Wanted, decoding: Decoding) -> list[np.ndarray]:
        """A conversation loses its oldest exchanges, as in `multistep chat`, never the last; a prompt is never cut."""
        context, codec = neural.context, neural.codec
        if asked.turns:
            room = context - decoding.max_new_tokens
            if room < 1:
                what = f"an answer of {decoding.max_new_tokens} tokens leaves no room"
                raise _too_long(what, context, "max_tokens")
            found = dialogue.prompt(codec.tokenizer, [Turn(role, text) for role, text in asked.turns], room)
            if found.cut:
                has = f"the last turn has {len(found.ids) + found.cut} tokens, {room} are left for it"
                raise _too_long(has, context, "messages")
            return [found.ids]
        if neural.reads == "pairs":
            prompts = codec.whole([neural.task.reads(Record(text, ())) for text in asked.prompts])
        else:  # of a model that takes turns too: the text as it is
            prompts = [np.append([codec.bos], p) for p in codec.pieces(asked.prompts)]
        if (longest := max(map(len, prompts))) > context:
            raise _too_long(f"a prompt has {longest} tokens", context, "prompt")
        read, limit = 0 if neural.reads == "pairs" else longest, neural.positions
        if limit is not None and read + decoding.max_new_tokens > limit:
            asks = f"an answer of {decoding.max_new_tokens} tokens" + (f" after a prompt of {read}" if read else "")
            raise _too_long(asks, limit, "max_tokens", "has positions for")
        return prompts


def _too_long(what: str, context: int, param: str, takes: str = "reads") -> Refused:
    return Refused(422, f"{what}; the model {takes} {context}.", param=param, code="context_length_exceeded")


async def finished(writing: Writing, seconds: float, waits: Waits = plainly) -> list[Any]:
    """What was written, when it is whole. Raises Refused: 503 where the time ran out in the queue, 504 while it was written."""
    try:
        async with asyncio.timeout(seconds):
            return await waits(writing.future)
    except TimeoutError:
        raise late(writing, seconds) from None
    finally:
        writing.leave()


def late(writing: Writing, seconds: float) -> Refused:
    if writing.begun:
        return Refused(504, f"the answer was not whole within {seconds:g} s; ask for fewer tokens.")
    return Refused(503, f"the request waited in the queue for {seconds:g} s.", after_s=seconds)


def _obeyed(tuned: Decoding, asked: Wanted, most: int) -> Decoding:
    """The tuned decoding with what the request asks for."""
    tokens = asked.max_tokens or min(tuned.max_new_tokens, most)
    changes: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": min(tuned.min_new_tokens, tokens)}
    if asked.repetition_penalty is not None:
        changes["repetition_penalty"] = asked.repetition_penalty
    top_k = None if asked.top_k is None else max(0, asked.top_k)
    return obeyed(
        tuned.with_(**changes), temperature=asked.temperature, top_p=asked.top_p, top_k=top_k, min_p=asked.min_p, seed=asked.seed
    )  # fmt: skip
