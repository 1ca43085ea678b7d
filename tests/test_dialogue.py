"""Tests of conversations as tokens: equal to transformers, the assistant's turns and no others, templates of many makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama2c_files import tokenizer_bin
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from multistep.data.cells import Turn
from multistep.dialogue import endings, ensure_template, prompt, render
from multistep.subwords import train_bytes, train_characters
from multistep.types import UserError

TEXTS = ["Hello, how are you? User: Assistant: System: yes no", "你好，你是谁？我是一个助手。", "2 + 2 = 4\n\nfour"] * 3
CHAT = (
    Turn("system", "Be short."), Turn("user", "Hello, who are you?"), Turn("assistant", "A helper."),
    Turn("user", "你好，你是谁？"), Turn("assistant", "我是一个助手。\n\n* 2 + 2 = 4"),
)  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for m in loop_messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ('<<SYS>>' + system + '<</SYS>>' if loop.index0 == 0 and system else '') "
    "+ m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Earlier answers without, the last with, an empty block of thoughts, as Qwen3's.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def _tokenizer(folder: Path, kind: str = "bytes", template: str | None = None) -> Any:
    path = folder / f"{kind}.json"
    if kind == "bytes":
        train_bytes(TEXTS, 330, path)
    else:
        train_characters([*TEXTS, " ".join(t.text for t in CHAT)], path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"] if kind == "bytes" else [],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def _theirs(tokenizer: Any, turns: Any, **how: Any) -> list[int]:
    messages = [{"role": t.role, "content": t.text} for t in turns]
    return tokenizer.apply_chat_template(messages, return_dict=False, **how)


def _said(tokenizer: Any, found: Any) -> list[str]:
    """The counted stretches, as texts."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], found.counted.astype(int), [0]])))
    return [tokenizer.decode(found.ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_our_template_counts_the_answers_and_their_ends(kind: str, tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, kind)
    assert ensure_template(tokenizer) and not ensure_template(tokenizer)
    found = render(tokenizer, CHAT)
    assert found.ids.tolist() == _theirs(tokenizer, CHAT) and (found.dropped, found.cut) == (0, 0)
    assert _said(tokenizer, found) == [f" {CHAT[2].text}</s>", f" {CHAT[4].text}</s>"]
    assert tokenizer.decode(found.ids) == (
        "<s>System: Be short.\nUser: Hello, who are you?\nAssistant: A helper.</s>User: 你好，你是谁？\n"
        "Assistant: 我是一个助手。\n\n* 2 + 2 = 4</s>"
    )
    asked = prompt(tokenizer, CHAT[:-1])
    assert asked.ids.tolist() == _theirs(tokenizer, CHAT[:-1], add_generation_prompt=True)
    # what is asked is how the conversation begins that was trained on; what is left is what counts
    assert found.ids[: len(asked.ids)].tolist() == asked.ids.tolist() and found.counted[len(asked.ids) :].all()
    assert tokenizer.decode(found.ids[len(asked.ids) :], skip_special_tokens=True).strip() == CHAT[4].text
    assert endings(tokenizer) == ((2,), ())


def test_our_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path)
    ensure_template(tokenizer)
    tokenizer.save_pretrained(tmp_path / "folder")
    again = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert _theirs(again, CHAT) == render(tokenizer, CHAT).ids.tolist()
    assert render(again, CHAT).counted.tolist() == render(tokenizer, CHAT).counted.tolist()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, ["A helper.<|im_end|>", CHAT[4].text + "<|im_end|>"]),
        (LLAMA2, [" A helper. </s>", f" {CHAT[4].text} </s>"]),
        (THINKING, ["A helper.<|im_end|>", "<think>\n\n</think>\n\n" + CHAT[4].text + "<|im_end|>"]),
        (MARKED, ["A helper.<|im_end|>", CHAT[4].text + "<|im_end|>"]),
        (PLAIN, [" A helper.\n\n", f" {CHAT[4].text}\n\n"]),
    ],
)
def test_a_model_s_own_template_is_kept(template: str, said: list[str], tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, template=template)
    assert not ensure_template(tokenizer)
    for turns, wanted in ((CHAT, said), (CHAT[3:], said[1:])):
        found = render(tokenizer, turns)
        assert found.ids.tolist() == _theirs(tokenizer, turns)
        assert _said(tokenizer, found) == wanted
    asked = prompt(tokenizer, CHAT[:-1])
    assert asked.ids.tolist() == _theirs(tokenizer, CHAT[:-1], add_generation_prompt=True)
    assert not render(tokenizer, CHAT).counted[: len(asked.ids)][-1] and render(tokenizer, CHAT).counted[len(asked.ids)]


def test_answers_that_look_like_the_template_are_found(tmp_path: Path) -> None:
    for template in (CHATML, LLAMA2, THINKING, PLAIN, None):
        tokenizer = _tokenizer(tmp_path, template=template)
        ensure_template(tokenizer)
        for text in ("s", "im_end", "assistant", "think", "\n", "Assistant: s", "a " * 3, " leading"):
            turns = [Turn("user", text), Turn("assistant", text), Turn("user", text), Turn("assistant", text)]
            said = _said(tokenizer, render(tokenizer, turns))
            assert len(said) == 2 and all(text.strip() in s for s in said)
            assert all(len(s) <= len(text) + 30 for s in said)


def test_how_answers_end(tmp_path: Path) -> None:
    ends = {t: endings(_tokenizer(tmp_path, template=t)) for t in (CHATML, LLAMA2, THINKING, MARKED, PLAIN)}
    im_end = _tokenizer(tmp_path).convert_tokens_to_ids("<|im_end|>")
    assert ends[CHATML] == ends[THINKING] == ends[MARKED] == ((2, im_end), ())
    assert ends[LLAMA2] == ((2,), ()) and ends[PLAIN] == ((2,), ("\n\n",))


def test_tokenizers_that_put_a_space_first(tmp_path: Path) -> None:
    from multistep.models.llama2c import read_tokenizer

    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=read_tokenizer(tokenizer_bin(tmp_path / "tokenizer.bin")), bos_token="<s>", eos_token="</s>"
    )
    ensure_template(tokenizer)
    turns = [Turn("user", "hello"), Turn("assistant", "hello 好."), Turn("user", "he"), Turn("assistant", "好")]
    found, asked = render(tokenizer, turns), prompt(tokenizer, turns[:-1])
    assert found.ids.tolist() == _theirs(tokenizer, turns)
    assert found.ids[: len(asked.ids)].tolist() == asked.ids.tolist()
    assert _said(tokenizer, found) == ["hello 好.</s>", "好</s>"]


def test_too_long_conversations_lose_their_oldest_exchanges_and_say_so(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, template=LLAMA2)
    turns = [
        Turn("system", "Be short."),
        *(t for n in range(9) for t in (Turn("user", f"q{n}"), Turn("assistant", f"a{n}"))),
    ]
    whole = len(render(tokenizer, turns).ids)
    for limit in (whole - 10, whole // 2, 60):
        found, asked = render(tokenizer, turns, limit), prompt(tokenizer, turns[:-1], limit)
        for got, of, how in ((found, turns, {}), (asked, turns[:-1], {"add_generation_prompt": True})):
            assert 0 < len(got.ids) <= limit and got.dropped > 0 and got.dropped % 2 == 0 and got.cut == 0
            kept = [turns[0], *of[1 + got.dropped :]]
            assert got.ids.tolist() == _theirs(tokenizer, kept, **how)
            more = [turns[0], *of[got.dropped - 1 :]]  # one exchange more would not have fitted
            assert len(_theirs(tokenizer, more, **how)) > limit
    assert render(tokenizer, turns, whole).dropped == 0
    last = [turns[0], *turns[-2:]]
    short = render(tokenizer, turns, 20)
    assert short.dropped == 16 and short.cut == len(_theirs(tokenizer, last)) - 20
    assert short.ids.tolist() == _theirs(tokenizer, last)[:20]
    asked = prompt(tokenizer, turns[:-1], 20)
    assert asked.dropped == 16 and asked.ids.tolist() == _theirs(tokenizer, last[:-1], add_generation_prompt=True)[-20:]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHATML.replace("assistant\n{%", "assistant\n<think>\n{%"), "the prompt for turn 3"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "does not write the text|rewrites the answer"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing follows an answer"),
        (THINKING.replace("and loop.last", "and not loop.last"), "writes turn 3 otherwise"),
        (CHATML.replace("{{ m.role }}", "{{ loop.length }}"), "the prompt for turn 3"),
        (MARKED.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}"), "no token"),
    ],
)
def test_templates_that_hide_the_answer_are_refused(template: str, words: str, tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, template=template)
    with pytest.raises(UserError, match=words):
        render(tokenizer, CHAT)


def test_what_a_template_refuses_is_said(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, template=LLAMA2)
    with pytest.raises(UserError, match=r"user, user, assistant .*must alternate"):
        render(tokenizer, [Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")])
    with pytest.raises(ValueError, match="ends with the assistant"):
        render(tokenizer, CHAT[:-1])
    silent = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "bytes.json"))
    with pytest.raises(UserError, match="no end token"):
        ensure_template(silent)
