"""Models that read a source and write a target: a small transformer from scratch, or any sequence-to-sequence model of a folder
or the hub. Forward only; knows no loss.

From scratch it is of the M2M100 class (pre-norm, fixed sinusoidal positions, one table of embeddings for source, target and
output): pre-norm trains without a long warm-up, and engines for fast decoding read this class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from multistep.models.decoder import rescale
from multistep.models.hub import load_pretrained


def new_seq2seq(
    vocab_size: int, width: int, layers: int, max_length: int, ids: dict[str, int], seed: int, dropout: float = 0.0
) -> Any:
    """`layers` encoder and as many decoder layers with random weights; `ids`: "pad", "bos", "eos" of its tokenizer."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    heads = max(1, width // 32)
    config = M2M100Config(
        vocab_size=vocab_size, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        max_position_embeddings=max_length, dropout=dropout, attention_dropout=0.0, activation_dropout=0.0,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0, init_std=width**-0.5, scale_embedding=True,
        pad_token_id=ids["pad"], bos_token_id=ids["bos"], eos_token_id=ids["eos"], decoder_start_token_id=ids["bos"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = M2M100ForConditionalGeneration(config)
        rescale(model, layers, ("out_proj.weight", "fc2.weight"))
    return model


def load_seq2seq(name: str | Path) -> Any:
    """A sequence-to-sequence model in float32. Raises UserError when it cannot be had."""
    from transformers import AutoModelForSeq2SeqLM

    return load_pretrained(AutoModelForSeq2SeqLM, str(name), "a sequence-to-sequence model")
