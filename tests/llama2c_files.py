"""A tiny tokenizer in the format of llama2.c."""

from __future__ import annotations

import struct
from pathlib import Path

PIECES = ["he", "ll", "▁he", "llo", "▁hello", "▁", "h", "e", "l", "o", ".", "好"]


def tokenizer_bin(path: Path, pieces: list[str] = PIECES) -> Path:
    every = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    data = struct.pack("<i", max(len(p.encode()) for p in every))
    for piece, score in zip(every, scores, strict=True):
        raw = piece.replace("▁", " ").encode()
        data += struct.pack("<fi", score, len(raw)) + raw
    path.write_bytes(data)
    return path
