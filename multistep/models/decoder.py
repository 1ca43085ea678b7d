"""Decoders: a small Llama from scratch, or any causal language model of a folder or the hub. Forward only; knows no loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from multistep.models.hub import load_pretrained


def new_decoder(vocab_size: int, width: int, layers: int, max_length: int, ids: dict[str, int], seed: int) -> Any:
    """A LlamaForCausalLM with random weights and tied embeddings; `ids`: "pad", "bos", "eos" of its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=64 * round(8 * width / 3 / 64) or 64,
        num_hidden_layers=layers, num_attention_heads=max(1, width // 32), max_position_embeddings=max_length,
        tie_word_embeddings=True, pad_token_id=ids["pad"], bos_token_id=ids["bos"], eos_token_id=ids["eos"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        rescale(model, layers, ("o_proj.weight", "down_proj.weight"))
    return model


def load_decoder(name: str | Path) -> Any:
    """A causal language model in float32. Raises UserError when it cannot be had."""
    from transformers import AutoModelForCausalLM

    return load_pretrained(AutoModelForCausalLM, str(name), "a causal language model")


def rescale(model: Any, layers: int, last: tuple[str, ...]) -> None:
    """Weights that end a residual branch start smaller, by sqrt(2 x layers): Radford et al. 2019 (GPT-2), section 2.3."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(last):
                parameter.mul_((2 * layers) ** -0.5)
