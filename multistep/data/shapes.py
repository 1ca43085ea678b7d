"""Which shape a table of language data has: what its columns are, by the user's word, else by their names. Rows become records in
cells.py, tables come from records.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from multistep.data.choices import Named, named_by
from multistep.data.columns import Facts, facts_of, find_text, is_id, names_of, require
from multistep.data.read import Row
from multistep.types import Spec, UserError, nearest

KINDS = ("lm", "translate", "summarize", "answer", "chat")
Form = Literal["text", "pair", "instruction", "messages", "question", "choices"]

_LM = ("text", "texts", "content", "document", "article", "body", "story", "code")
_MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns")
_INSTRUCTIONS = ("instruction", "instructions")
_INPUTS = ("input", "inputs")
_OUTPUTS = ("output", "outputs", "response", "completion", "answer")
_SYSTEM = ("system", "system_prompt")
_QUESTIONS = ("question", "query", "question_stem")
_CONTEXTS = ("context", "passage", "paragraph", "support", "article", "document")
_ANSWERS = ("answers", "answer", "answer_text", "answerkey", "answer_key", "correct_answer", "label", "response")
_STARTS = ("answer_starts", "answer_start")
_CHOICES = ("choices", "options", "endings")
_LETTERED = (("a", "b", "c", "d", "e"), ("choice_a", "choice_b", "choice_c", "choice_d"),
             ("option_a", "option_b", "option_c", "option_d"), ("choice1", "choice2", "choice3", "choice4"),
             ("option1", "option2", "option3", "option4"), ("ending0", "ending1", "ending2", "ending3"))  # fmt: skip
_REFERENCES = ("references", "targets", "summaries")
_PROMPTED = (("prompt", "completion"), ("prompt", "response"), ("prompt", "chosen"), ("prompt", "output"))
_PAIRED = (("source", "target"), ("src", "tgt"), ("src", "trg"), ("source_text", "target_text"), ("input", "output"))
_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "translate": (*_PAIRED, *_PROMPTED, ("original", "translation"), ("text", "translation")),
    "summarize": (
        *((text, summary) for summary in ("summary", "highlights", "tldr", "abstract", "headline", "subject", "title")
          for text in ("document", "article", "dialogue", "text", "content", "body", "report", "source", "abstract")
          if text != summary),
        *_PAIRED, *_PROMPTED,
    ),
    "chat": (*_PROMPTED, ("question", "answer"), ("question", "response"), ("query", "response"), *_PAIRED),
}  # fmt: skip
_LANGUAGES = frozenset({
    "af", "am", "ar", "as", "az", "be", "bg", "bn", "br", "bs", "ca", "cs", "cy", "da", "de", "el", "en", "eo", "es", "et",
    "eu", "fa", "fi", "fr", "ga", "gl", "gu", "ha", "he", "hi", "hr", "hu", "hy", "id", "ig", "is", "it", "ja", "jv", "ka",
    "kk", "km", "kn", "ko", "ku", "ky", "la", "lb", "lo", "lt", "lv", "mg", "mi", "mk", "ml", "mn", "mr", "ms", "mt", "my",
    "nb", "ne", "nl", "nn", "no", "oc", "or", "pa", "pl", "ps", "pt", "ro", "ru", "rw", "sd", "se", "sh", "si", "sk", "sl",
    "so", "sq", "sr", "st", "sv", "sw", "ta", "te", "tg", "th", "tk", "tl", "tn", "tr", "tt", "ug", "uk", "ur", "uz", "vi",
    "wa", "xh", "yi", "yo", "zh", "zu",
})  # fmt: skip


class Layout(Spec):
    """What the columns of a table are. `why` is shown to the user; the rest is kept with the model, for later files.

    source: lm's text, the side to start from, the instruction, the question, or the list of messages."""

    task: str
    form: Form
    source: tuple[str, ...]
    target: str | None = None  # the right answer, or a list of them; None for lm and messages
    references: str | None = None  # more right answers
    input: str | None = None
    context: str | None = None
    starts: str | None = None
    choices: tuple[str, ...] = ()
    named_by: Named | None = None  # how the right answer names its choice; None: each row by itself
    system: str | None = None
    history: str | None = None
    why: str = ""

    def needed(self, target: bool = True) -> list[str]:
        """The columns that every file must have."""
        answer = [self.target] if target and self.target else []
        return [*self.source, *self.choices, *([self.context] if self.context else []), *answer]


def check_kind(task: str) -> None:
    if task not in KINDS:
        raise UserError(f"task: {task!r} is no language task.{nearest(task, KINDS)}")


def check_layout(rows: Sequence[Row], layout: Layout, where: str, target: bool = True) -> None:
    """Another file must have the columns of the training file."""
    names = names_of(rows)
    for name in layout.needed(target):
        require(name, names, where)


def find_layout(
    rows: Sequence[Row], task: str, text: Sequence[str], label: str | None, where: str, others: Sequence[Row] = ()
) -> Layout:
    """The shape of `rows` for `task`. `text`, `label`: what the user named (answer: the question, then the context). `others`: rows of
    other splits, where more right answers may be though train has one."""
    names = names_of(rows)
    for name in (*text, *([label] if label is not None else [])):
        require(name, names, where)
    if label is not None and label in text:
        raise UserError(
            f"{where}: column {label!r} is named as text and as label. Name another with --text or --label."
        )
    table = _Table(rows, names)
    if task == "lm":
        layout = _find_lm(table, text, where)
    elif task == "answer":
        layout = _find_answer(table, text, label, where)
    elif task == "chat":
        layout = _find_chat(table, text, label, where)
    else:
        layout = _find_pair(table, task, text, label, where, names_of(others))
    more = (layout.references, layout.input, layout.starts, layout.system, layout.history)
    unused = [n for n in names if n not in (*layout.needed(), *more)]
    tail = f"; not used: {', '.join(unused[:8])}{' ...' if len(unused) > 8 else ''}" if unused else ""
    return layout.with_(why=layout.why + tail)


class _Table:
    """The columns of a table by their plain names, and what is in them, looked at only when asked."""

    def __init__(self, rows: Sequence[Row], names: Sequence[str]):
        self.rows = rows
        self.names = names
        self.plain = {name.strip().lower(): name for name in reversed(names)}

    def first(self, known: Iterable[str], but: Sequence[str | None] = ()) -> str | None:
        return next((self.plain[k] for k in known if k in self.plain and self.plain[k] not in but), None)

    def pair(self, known: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
        return next(((self.plain[a], self.plain[b]) for a, b in known if a in self.plain and b in self.plain), None)

    def facts(self, but: Sequence[str] = ()) -> list[Facts]:
        return [facts_of(name, self.rows) for name in self.names if name not in but]

    def texts(self, but: Sequence[str] = ()) -> list[Facts]:
        """Columns of texts that are no ids."""
        return [f for f in self.facts(but) if f.words > 0.5 and not is_id(f.name)]


# ---------------------------------------------------------------------------------------------- one finder a task


def _find_lm(table: _Table, text: Sequence[str], where: str) -> Layout:
    named = table.first(_LM)
    columns = tuple(text) or ((named,) if named else find_text(table.rows, where))
    return Layout(task="lm", form="text", source=columns, why=f"plain text from {_joined(columns)}{_named(text)}")


def _find_pair(
    table: _Table, task: str, text: Sequence[str], label: str | None, where: str, others: Sequence[str]
) -> Layout:
    how = " (as named)" if text and label else ""
    pair = table.pair(_PAIRS[task])
    if task == "translate" and not pair:
        pair = _languages(table)
    if not (text and label) and not pair:
        pair, how = _guess(table, task, text, label), " (a guess: the only columns of texts)"
    source = tuple(text) or ((pair[0],) if pair else ())
    target = label or (pair[1] if pair else None)
    if not source or target is None or target in source:
        want = "source and target, or two language codes" if task == "translate" else "document and summary"
        raise UserError(
            f"{where}: no pair of columns for --task {task} ({want}; columns: {_list(table.names)}). "
            "Name them with --text and --label."
        )
    more = table.first(_REFERENCES, (*source, target)) or next(
        (n for n in others if n.lower() in _REFERENCES and n not in (*source, target)), None
    )
    tail = f", more right answers from {more!r}" if more else ""
    word = {"translate": "source/target", "summarize": "document/summary"}[task]
    why = f"{word}: {_joined(source)} to {target!r}{how}{tail}"
    return Layout(task=task, form="pair", source=source, target=target, references=more, why=why)


def _languages(table: _Table) -> tuple[str, str] | None:
    codes = [f for f in table.facts() if f.words > 0.5 and _is_language(f.name)]
    codes = [f for f in codes if not is_id(f.name)] if len(codes) > 2 else codes
    return (codes[0].name, codes[1].name) if len(codes) == 2 else None


def _is_language(name: str) -> bool:
    return name.strip().lower().replace("_", "-").partition("-")[0] in _LANGUAGES


def _guess(table: _Table, task: str, text: Sequence[str], label: str | None) -> tuple[str, str] | None:
    """Two columns of texts and no more, or the one that is left beside the named one."""
    rest = table.texts([*text, *([label] if label else [])])
    if len(rest) != 2 - bool(text) - bool(label):
        return None
    if len(rest) == 1:
        return (text[0], rest[0].name) if text else (rest[0].name, label or "")
    if task == "summarize" and rest[0].length < rest[1].length:
        rest.reverse()
    return rest[0].name, rest[1].name


def _find_chat(table: _Table, text: Sequence[str], label: str | None, where: str) -> Layout:
    system = table.first(_SYSTEM)
    messages = (
        next((n for n in _MESSAGES if n in table.plain and _holds_lists(table, table.plain[n])), None)
        if not text
        else None
    )
    if text and label is None and _holds_lists(table, text[0]):
        messages = text[0].strip().lower()
    if messages and label is None:
        name = table.plain[messages]
        return Layout(
            task="chat", form="messages", source=(name,), system=system, why=f"messages from {name!r}{_named(text)}"
        )
    instruction, output = table.first(_INSTRUCTIONS), label or table.first(_OUTPUTS)
    if instruction and output and not text:
        more, history = table.first(_INPUTS, (output,)), table.first(("history",))
        said = "/".join(["instruction", *(["input"] if more else []), "output"])
        columns = " + ".join(map(repr, filter(None, (instruction, more))))
        return Layout(
            task="chat", form="instruction", source=(instruction,), target=output, input=more, system=system,
            history=history, why=f"{said}: {columns} to {output!r}",
        )  # fmt: skip
    pair, how = table.pair(_PAIRS["chat"]), _named(text or label)
    if not (text and label) and not pair:
        pair, how = _guess(table, "chat", text, label), " (a guess: the only columns of texts)"
    source = tuple(text) or ((pair[0],) if pair else ())
    target = label or (pair[1] if pair else None)
    if not source or target is None or target in source:
        raise UserError(
            f"{where}: no conversation found (messages, instruction/output, prompt/completion or question/answer; columns: "
            f"{_list(table.names)}). Name the column of messages with --text, or a pair with --text and --label."
        )
    why = f"prompt/completion: {_joined(source)} to {target!r}{how}"
    return Layout(task="chat", form="pair", source=source, target=target, system=system, why=why)


def _find_answer(table: _Table, text: Sequence[str], label: str | None, where: str) -> Layout:
    if len(text) > 2:
        raise UserError(f"{where}: {len(text)} columns named with --text. Name the question, and after it the context.")
    question = text[0] if text else table.first(_QUESTIONS, (label,))
    choices = _choices(table, (question, label))
    target = label or table.first(_ANSWERS, (*text, question))
    if question is None or target is None:
        missing = "question" if question is None else "answer"
        flag = "--text" if question is None else "--label"
        raise UserError(f"{where}: no {missing} column (columns: {_list(table.names)}). Name it with {flag}.")
    context = text[1] if len(text) == 2 else table.first(_CONTEXTS, (question, target, *choices))
    named = " (as named)" if text or label else ""
    if choices:
        how = named_by(table.rows, choices, target)
        said = f"{'context/' if context else ''}question/choices/answer: {question!r}, {_joined(choices)}, answer {target!r}"
        said += f" by its {how}" if how else ""
        return Layout(
            task="answer", form="choices", source=(question,), target=target, context=context, choices=choices, named_by=how,
            why=said + named,
        )  # fmt: skip
    starts = table.first(_STARTS) if context else None
    parts = [repr(name) for name in (context, question, target, starts) if name]
    said = f"{'context/' if context else ''}question/{'answers' if context else 'answer'}: {', '.join(parts)}{named}"
    return Layout(
        task="answer", form="question", source=(question,), target=target, context=context, starts=starts, why=said
    )


def _choices(table: _Table, but: Sequence[str | None]) -> tuple[str, ...]:
    one = table.first(_CHOICES, but)
    if one:
        return (one,)
    for names in _LETTERED:
        found = [table.plain[n] for n in names if n in table.plain and table.plain[n] not in but]
        if len(found) >= 2 and names[0] in table.plain and names[1] in table.plain:
            return tuple(found)
    return ()


def _holds_lists(table: _Table, name: str) -> bool:
    cells = [row.get(name) for row in table.rows[:100]]
    return any(isinstance(cell, list) or (isinstance(cell, str) and cell.lstrip().startswith("[{")) for cell in cells)


# ---------------------------------------------------------------------------------------------- words


def _named(text: object) -> str:
    return " (as named)" if text else ""


def _joined(columns: Sequence[str]) -> str:
    return " + ".join(map(repr, columns))


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")
