"""Tasks whose answer is a text: what is read, what is right, and which metric counts when nobody says.

    lm         go on with a text                      bits_per_byte
    translate  say it in another language             bleu
    summarize  say it shorter                         rougeL
    answer     a question: from a passage (f1), among choices (choice_accuracy), by a number (numbers), freely (exact_match)
    chat       the next turn of a conversation        bits_per_byte, of the assistant's turns

No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from multistep.data.cells import Record
from multistep.metrics.texts import statistics, value
from multistep.metrics.words import last_number
from multistep.types import Spec

WritingKind = Literal["lm", "translate", "summarize", "answer", "chat"]
WRITING: tuple[WritingKind, ...] = ("lm", "translate", "summarize", "answer", "chat")
WHAT: dict[WritingKind, str] = {
    "lm": "go on with a text", "translate": "say it in another language", "summarize": "say it shorter",
    "answer": "a question: from a passage, among choices, by a number or freely", "chat": "the next turn of a conversation",
}  # fmt: skip
LOSSES = ("bits_per_byte", "perplexity")  # metrics that are read off losses
_NUMBERS = 0.9  # of the answers end in a number after "####", as GSM8K's do: then numbers are compared
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Writing(Spec):
    """`answers`: how a question is answered; "" for the other tasks."""

    kind: WritingKind
    answers: Literal["", "passage", "choices", "number", "free"] = ""

    @property
    def default_metric(self) -> str:
        match self.kind, self.answers:
            case "lm" | "chat", _:
                return "bits_per_byte"
            case "translate", _:
                return "bleu"
            case "summarize", _:
                return "rougeL"
            case _, "passage":
                return "f1"
            case _, "choices":
                return "choice_accuracy"
            case _, "number":
                return "numbers"
            case _:
                return "exact_match"

    @property
    def metrics(self) -> tuple[str, ...]:
        """What a report shows beside the metric that decides."""
        match self.kind:
            case "lm":
                return ("bits_per_byte", "perplexity")
            case "translate":
                return ("bleu", "chrf")
            case "summarize":
                return ("rouge1", "rouge2", "rougeL")
            case "answer":
                return ("exact_match", "f1")
            case "chat":
                return ("bits_per_byte", "perplexity")

    @property
    def writes(self) -> bool:
        """Whether texts are judged; a language model is judged by its losses alone."""
        return self.kind != "lm"

    def reads(self, record: Record) -> str:
        """All that the answer may depend on, as one text. A conversation is rendered by `dialogue` where the model has turns."""
        if self.kind == "chat":
            return "\n".join(turn.text for turn in record.asked)
        parts = [record.source, record.context]
        parts += [f"{_LETTERS[i % 26]}. {choice}" for i, choice in enumerate(record.choices)]
        return "\n".join(part for part in parts if part)

    def score(self, record: Record, text: str) -> float:
        """One answer by the task's own metric, higher is better; the text itself is the whole of it for lm and chat."""
        name = {"lm": "rougeL", "chat": "rougeL"}.get(self.kind, self.default_metric)
        return float(value(name, statistics(name, [text], [record.targets])[0]))


def writing_task(kind: WritingKind, records: Sequence[Record]) -> Writing:
    """The task of these records: how their questions are answered is read off the first few hundred."""
    if kind != "answer":
        return Writing(kind=kind)
    some = records[:500]
    if any(r.choices for r in some):
        return Writing(kind=kind, answers="choices")
    if any(r.context for r in some):
        return Writing(kind=kind, answers="passage")
    numbered = sum("####" in r.targets[0] and last_number(r.targets[0]) is not None for r in some)
    return Writing(kind=kind, answers="number" if numbered >= _NUMBERS * len(some) else "free")
