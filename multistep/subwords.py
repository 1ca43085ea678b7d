"""Words and subwords for encoders: load a tokenizer, train one, texts to ids. (N-gram features for linear models are in text.py.)"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from multistep.files import reading
from multistep.text import unspaced_share
from multistep.types import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WRITING = ("<pad>", "<s>", "</s>")  # of tokenizers for models that write
_BATCH_CHARACTERS = 20_000_000  # texts are handed over in parts, so that a huge file does not become one huge list
_CUT_CHARACTERS = 12  # characters a token that are looked at: far more than any script needs


def load_tokenizer(name: str) -> Tokenizer:
    """The fast tokenizer of a local folder or of a hub name. Raises UserError when there is none."""
    path = Path(name) / "tokenizer.json"
    try:
        tokenizer = read_tokenizer(path) if path.exists() else _of_transformers(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(
            f"model: {name!r} has no tokenizer that can be loaded ({reason}). Add tokenizer.json."
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """Of a tokenizer.json. Raises ValueError where it is damaged."""
    with reading(path):
        return Tokenizer.from_file(str(path))


def _of_transformers(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    with reading(Path("tokenizer.json")):
        loaded = AutoTokenizer.from_pretrained(name)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"model: {name!r} has no fast tokenizer (tokenizer.json). Choose another encoder.")
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int, path: Path) -> None:
    """A WordPiece tokenizer trained on `texts` and written to `path`. CJK characters stand alone, as in BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers the characters inside words in the order of a hash table, another one in each process, and the
    # numbers decide between merges that are equally frequent. Named as special tokens they have their places first.
    inner = _inner_characters(tokenizer, texts)
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocab_size, len(SPECIAL) + 2 * len(inner)),
        special_tokens=[*SPECIAL, *inner],
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator((_encodable(t) for t in texts), trainer, length=len(texts))
    trained = Tokenizer(models.WordPiece(vocab=tokenizer.get_vocab(), unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.add_special_tokens(list(SPECIAL))
    tokenizer = trained
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(path))


def train_words(texts: Sequence[str], vocab_size: int, path: Path) -> None:
    """A tokenizer of the most frequent lower-case words and marks of `texts`, written to `path`; all others are [UNK]. Words are
    numbered by frequency, then by spelling. Where over 30 % of the letters are of scripts without spaces: `train_tokenizer`."""
    if unspaced_share(texts) > 0.3:
        return train_tokenizer(texts, vocab_size, path)
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL[:3]), min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator((_encodable(t) for t in texts), trainer, length=len(texts))
    cls = tokenizer.token_to_id("[CLS]")  # begins every row, so that a text without a word has one token too
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", cls)])
    tokenizer.save(str(path))
    return None


def train_bytes(texts: Sequence[str], vocab_size: int, path: Path, ends: bool = False) -> None:
    """A byte-level BPE tokenizer for models that write: no text is unknown to it, and decoding gives the text back.

    `vocab_size` of 259 or less: no merges, a token a byte. Ids 0, 1, 2 are padding, begin and end; `ends`: every text gets its end.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, len(WRITING) + len(alphabet)),
        special_tokens=list(WRITING),
        initial_alphabet=alphabet,
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator((_encodable(t) for t in texts), trainer, length=len(texts))
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.save(str(path))


def train_characters(texts: Sequence[str], path: Path) -> None:
    """A token a character of `texts`, the most frequent first; others are unknown. Ids 0, 1, 2 are padding, begin and end."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_encodable(text))
    vocabulary = [*WRITING, "<unk>", *sorted(counts, key=lambda c: (-counts[c], c))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(WRITING))
    tokenizer.save(str(path))


def _inner_characters(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The pieces `##x` of characters that can stand inside a word of `texts`, in the order of their code points."""
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    assert normalizer is not None and pre_tokenizer is not None
    seen = set().union(*texts)
    known = {c for c in normalizer.normalize_str(_encodable(" ".join(sorted(seen)))) if not c.isspace()}
    inner = (c for c in sorted(known) if len(pre_tokenizer.pre_tokenize_str(normalizer.normalize_str("a" + c))) == 1)
    return ["##" + c for c in inner]


def encode_ids(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> tuple[list[np.ndarray], int]:
    """Ids (int32, special tokens included) of each text, cut at `max_length`; and how many texts were cut."""
    tokenizer.enable_truncation(max_length)
    ids: list[np.ndarray] = []
    cut = 0
    look = max_length * _CUT_CHARACTERS
    start = 0
    while start < len(texts):
        end, size = start, 0
        while end < len(texts) and size < _BATCH_CHARACTERS:
            size += min(len(texts[end]), look)
            end += 1
        part = [_encodable(t[:look]) for t in texts[start:end]]
        for text, encoding in zip(texts[start:end], tokenizer.encode_batch(part), strict=True):
            ids.append(np.array(encoding.ids, dtype=np.int32))
            cut += bool(encoding.overflowing) or len(text) > look
        start = end
    tokenizer.no_truncation()
    return ids, cut


def encode_places(tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each text ids [T] int32 without special tokens, and where each token begins and ends in it [T,2], in characters. Nothing is
    cut."""
    found = tokenizer.encode_batch([_encodable(t) for t in texts], add_special_tokens=False)
    return [(np.array(e.ids, dtype=np.int32), np.array(e.offsets, dtype=np.int32).reshape(-1, 2)) for e in found]


class PairFrame(NamedTuple):
    """The special tokens around a pair of texts, and the segment of each of the five parts."""

    before: list[int]
    between: list[int]
    after: list[int]
    segments: tuple[int, int, int, int, int]


def pair_frame(tokenizer: Tokenizer) -> PairFrame:
    """As the tokenizer joins pairs; where it does not separate them, by what ends a text of its own."""
    single, pair = tokenizer.encode("a"), tokenizer.encode("a", "a")
    own = [i for i, special in enumerate(pair.special_tokens_mask) if not special]
    first, second = ([i for i in own if pair.sequence_ids[i] == n] for n in (0, 1))
    if not first or not second:
        raise UserError("model: its tokenizer does not know the letter 'a', so pairs of texts cannot be joined.")
    ids, kinds = pair.ids, pair.type_ids
    between = ids[first[-1] + 1 : second[0]]
    frame = PairFrame(ids[: first[0]], between, ids[second[-1] + 1 :], (0, 0, 0, kinds[second[0]], kinds[second[0]]))
    if not between:
        inside = [i for i, special in enumerate(single.special_tokens_mask) if not special]
        end = single.ids[inside[-1] + 1 :]
        frame = PairFrame(single.ids[: inside[0]], end, end, (0, 0, 0, 1, 1))
    return frame


def unknown_rate(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """The share of tokens that the tokenizer does not know; 0 for tokenizers that know every byte."""
    unknown = next((i for t in ("[UNK]", "<unk>") if (i := tokenizer.token_to_id(t)) is not None), None)
    if unknown is None:
        return 0.0
    ids = [i for e in tokenizer.encode_batch([_encodable(t) for t in texts], add_special_tokens=False) for i in e.ids]
    return ids.count(unknown) / max(1, len(ids))


def _encodable(text: str) -> str:
    """Lone surrogates, which no UTF-8 can hold, become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json, and a tokenizer_config.json with which AutoTokenizer loads it."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    plain.save(str(folder / "tokenizer.json"))
    special = {
        f"{name}_token": token
        for name, token in (("pad", "[PAD]"), ("unk", "[UNK]"), ("cls", "[CLS]"), ("sep", "[SEP]"), ("mask", "[MASK]"))
        if plain.token_to_id(token) is not None
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
