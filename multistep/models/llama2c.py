"""Models of llama2.c: its two binary files to a folder that transformers loads.

    model:      7 int32 (D, F, L, H, G, V, T), then float32: embedding [V,D], attention norms [L,D], wq [L,D,D], wk [L,GE,D],
                wv [L,GE,D], wo [L,D,D], norms [L,D], w1 [L,F,D], w2 [L,D,F], w3 [L,F,D], last norm [D], two rotary tables
                [T,E/2] that nothing reads, and the output [V,D] where V is written as a negative number (else it is the embedding)
    tokenizer:  int32 longest piece, then a token: float32 score, int32 length, UTF-8 bytes

Source: github.com/karpathy/llama2.c (export.py, tokenizer.py, run.c). The tokenizer is a BPE of sentencepiece with byte fallback;
here it becomes a tokenizer.json, so that sentencepiece is not needed. All numbers are little-endian.
Differs from sentencepiece: "<s>" and "</s>" inside of a text are the special tokens.
Shapes: D width, F inner width, L layers, H heads, G heads of keys and values, E width of a head, V tokens, T positions.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from multistep.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

UNKNOWN, BEGIN, END = 0, 1, 2  # ids; padding is UNKNOWN, which byte fallback never writes
SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = range(3, 259)  # <0x00> to <0xFF>
_SPACE = "▁"  # how a space is written in a piece


class Header(NamedTuple):
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int  # negative: the output has weights of its own
    positions: int


def convert(bin_path: Path, tokenizer_path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files; AutoModelForCausalLM and
    AutoTokenizer load them. Raises UserError when a file is not what it should be."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = read_model(bin_path)
    tokenizer = read_tokenizer(tokenizer_path)
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        raise UserError(
            f"tokenizer: {tokenizer_path} has {tokenizer.get_vocab_size()} tokens and {bin_path} {model.config.vocab_size}. "
            "Give the tokenizer that the model was trained with."
        )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=SPECIAL[UNKNOWN], bos_token=SPECIAL[BEGIN], eos_token=SPECIAL[END],
        pad_token=SPECIAL[UNKNOWN], model_max_length=model.config.max_position_embeddings, clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip


# ---------------------------------------------------------------------------------------------- the model


def read_model(path: Path) -> Any:
    """A LlamaForCausalLM in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    header, weights = _read(path)
    tied = header.vocab_size > 0
    config = LlamaConfig(
        vocab_size=abs(header.vocab_size), hidden_size=header.width, intermediate_size=header.inner,
        num_hidden_layers=header.layers, num_attention_heads=header.heads, num_key_value_heads=header.kv_heads,
        max_position_embeddings=header.positions, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=UNKNOWN, bos_token_id=BEGIN, eos_token_id=END,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    state = _named(weights, header)
    model.load_state_dict(
        {**state, "lm_head.weight": state["lm_head.weight" if not tied else "model.embed_tokens.weight"]}
    )
    return model.eval()


def _read(path: Path) -> tuple[Header, dict[str, np.ndarray]]:
    data = _bytes(path, "model")
    header = Header(*struct.unpack("<7i", data[:28])) if len(data) >= 28 else None
    if header is None or min(*header[:5], abs(header.vocab_size), header.positions) < 1 or header.width % header.heads:
        raise UserError(f"model: {path} does not begin with the 7 sizes of a llama2.c model. Give a .bin of version 0.")
    d, f, n, _, _, v, t = header
    v, width = abs(v), d // header.heads
    kv = header.kv_heads * width
    shapes = {
        "embedding": (v, d), "norm": (n, d), "wq": (n, d, d), "wk": (n, kv, d), "wv": (n, kv, d), "wo": (n, d, d),
        "mlp_norm": (n, d), "w1": (n, f, d), "w2": (n, d, f), "w3": (n, f, d), "last_norm": (d,),
        "cos": (t, width // 2), "sin": (t, width // 2),
    }  # fmt: skip
    if header.vocab_size < 0:
        shapes["output"] = (v, d)
    wanted = 28 + 4 * sum(int(np.prod(s, dtype=np.int64)) for s in shapes.values())
    if len(data) != wanted:
        raise UserError(
            f"model: {path} has {len(data)} bytes, and a llama2.c model of its sizes {tuple(header)} {wanted}. "
            "It is cut off, or not of version 0 (float32)."
        )
    weights, at = {}, 28
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        weights[name] = np.frombuffer(data, dtype="<f4", count=count, offset=at).reshape(shape).astype(np.float32)
        at += 4 * count
    return header, weights


def _named(weights: dict[str, np.ndarray], header: Header) -> dict[str, Tensor]:
    """The weights by the names of transformers."""
    import torch

    state = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["last_norm"]}
    if "output" in weights:
        state["lm_head.weight"] = weights["output"]
    for n in range(header.layers):
        at = f"model.layers.{n}."
        state |= {
            at + "input_layernorm.weight": weights["norm"][n],
            at + "post_attention_layernorm.weight": weights["mlp_norm"][n],
            at + "self_attn.q_proj.weight": _halves(weights["wq"][n], header.heads),
            at + "self_attn.k_proj.weight": _halves(weights["wk"][n], header.kv_heads),
            at + "self_attn.v_proj.weight": weights["wv"][n],
            at + "self_attn.o_proj.weight": weights["wo"][n],
            at + "mlp.gate_proj.weight": weights["w1"][n],
            at + "mlp.down_proj.weight": weights["w2"][n],
            at + "mlp.up_proj.weight": weights["w3"][n],
        }
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def _halves(weight_RD: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from interleaved pairs (0,1), (2,3) ... to halves: transformers rotates row i with row i + E/2."""
    rows, width = weight_RD.shape
    return weight_RD.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


# ---------------------------------------------------------------------------------------------- the tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """Encodes as sentencepiece does: <s> first, a space before the first word, bytes for what has no piece."""
    pieces, scores = _read_pieces(path)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _merges(pieces, scores, vocabulary), unk_token=SPECIAL[UNKNOWN], fuse_unk=True, byte_fallback=True)
    )  # fmt: skip
    # Whether sentencepiece was told to remove extra spaces is not in the file; a vocabulary that learned none in a row says it.
    spared = any(_SPACE * 2 in piece for piece in pieces)
    trimmed = (
        []
        if spared
        else [normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [*trimmed, normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BEGIN]} $A", pair=f"{SPECIAL[BEGIN]} $A {SPECIAL[BEGIN]} $B",
        special_tokens=[(SPECIAL[BEGIN], BEGIN)],
    )  # fmt: skip
    return tokenizer


def _read_pieces(path: Path) -> tuple[list[str], list[float]]:
    data = _bytes(path, "tokenizer")
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    try:
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            if length < 0 or at + 8 + length > len(data):
                raise ValueError(f"a piece of {length} bytes")
            pieces.append(data[at + 8 : at + 8 + length].decode("utf-8").replace(" ", _SPACE))
            scores.append(score)
            at += 8 + length
    except (ValueError, struct.error):
        raise UserError(
            f"tokenizer: {path} breaks off at token {len(pieces)} (byte {at}). Give a llama2.c .bin."
        ) from None
    if pieces[_BYTES.start : _BYTES.stop] != [f"<0x{byte:02X}>" for byte in range(256)]:
        raise UserError(f"tokenizer: {path} has no bytes at ids 3 to 258. Give a tokenizer.bin of llama2.c.")
    pieces[: len(SPECIAL)] = SPECIAL  # llama2.c writes begin and end with line breaks around them
    if len(set(pieces)) < len(pieces):
        raise UserError(f"tokenizer: {path} has the same piece twice.")
    return pieces, scores


def _merges(pieces: list[str], scores: list[float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others; the piece with the higher score first, as sentencepiece merges."""
    found: list[tuple[float, int, int, int]] = []
    for whole in range(_BYTES.stop, len(pieces)):
        piece = pieces[whole]
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[whole], whole, left, right))
    return [(pieces[left], pieces[right]) for _, _, left, right in sorted(found)]


def _bytes(path: Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror}).") from None
