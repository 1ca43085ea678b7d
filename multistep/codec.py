"""A tokenizer as models that write need it: texts to ids and back, and the tokens that begin, end and pad them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from multistep.files import reading
from multistep.types import UserError


class Codec:
    """A fast tokenizer of transformers: texts to ids and back. Raises UserError where it lacks what writing needs."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError("model: its tokenizer has no end token (eos_token). Add one to tokenizer_config.json.")
        self.eos = int(tokenizer.eos_token_id)
        self.bos = int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.eos)
        self.pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos)
        self.unknown = tokenizer.unk_token_id

    @classmethod
    def load(cls, folder: str | Path) -> Codec:
        """From a folder or the hub. Raises UserError when there is no fast tokenizer."""
        from transformers import AutoTokenizer

        try:
            with reading(Path("tokenizer.json")):
                tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise UserError(f"model: {str(folder)!r} has no tokenizer that can be loaded ({reason}).") from None
        if not tokenizer.is_fast:
            raise UserError(f"model: {str(folder)!r} has no fast tokenizer. Add tokenizer.json.")
        return cls(tokenizer)

    def pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text alone, nothing added."""
        return [np.array(e.ids, np.int64) for e in self._encoded(texts, special=False)]

    def whole(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text with the begin and end tokens that the tokenizer adds."""
        return [np.array(e.ids, np.int64) for e in self._encoded(texts, special=True)]

    def targets(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as an answer: they end with the end token."""
        found = []
        for ids in self.whole(texts):
            found.append(ids if len(ids) and ids[-1] == self.eos else np.append(ids, self.eos))
        return found

    def _encoded(self, texts: Sequence[str], special: bool) -> list[Any]:
        encodable = [t if t.isascii() else t.encode("utf-8", "replace").decode("utf-8") for t in texts]
        return self._plain.encode_batch(encodable, add_special_tokens=special)

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer where a text that spells a special token, such as <unk> or </s>, is text. (Templates of conversations are not read by
        this one: there they are tokens.)"""
        plain = copy.deepcopy(self.tokenizer.backend_tokenizer)
        plain.encode_special_tokens = True
        return plain

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
