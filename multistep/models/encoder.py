"""A transformer encoder, the mean of its last hidden states, and a linear head. Forward only; knows no loss.

The forward pass can be cut at a layer: `lower` gives the hidden states after the first layers and `upper` goes on from them, so
that training of the last layers runs on cached states of the frozen ones (half the cost of a full update with half the layers).
Pooled features are scaled to a root mean square of 1, so that one learning rate and one range of L2 strengths fit all encoders.

Shapes: B examples, T tokens, D hidden width, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from multistep.files import reading
from multistep.models.base import TextEncoder, zero_head
from multistep.types import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Model types whose layers (backbone.encoder.layer) can be called one by one on (hidden states, additive mask).
LAYERED = ("bert", "roberta", "xlm-roberta", "camembert")
_MASKED = -1e9


class Encoder(TextEncoder):
    """`backbone`: a transformers encoder; `n_outputs`: K. The head starts at zero."""

    encode_tokens: ClassVar[int] = 2048

    def __init__(self, backbone: PreTrainedModel, n_outputs: int):
        super().__init__()
        self.backbone: Any = backbone
        self.config: Any = backbone.config
        self.head = zero_head(self.config.hidden_size, n_outputs)

    @property
    def pad_id(self) -> int:
        return int(self.config.pad_token_id or 0)

    @property
    def positions(self) -> int | None:
        """By its table of positions; one that turns or compares positions has none. The table's rows up to that of padding are not used."""
        named = [m for name, m in self.backbone.named_modules() if name.split(".")[-1] == "position_embeddings"]
        table = next((m for m in named if isinstance(m, nn.Embedding)), None)
        if table is None:
            return None
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)

    def layers(self) -> Sequence[nn.Module]:
        return list(self.backbone.encoder.layer) if self.config.model_type in LAYERED else []

    def lower(self, x: Tensor, mask_BT: Tensor, n_layers: int, after: int = 0) -> Tensor:
        """Hidden states [B,T,D] after the first `n_layers` layers, from token ids [B,T] or, with `after` > 0, from those after so many."""
        hidden_BTD = x if after else self.backbone.embeddings(input_ids=x)
        return self._through(self.layers()[after:n_layers], hidden_BTD, mask_BT)

    def upper(self, hidden_BTD: Tensor, mask_BT: Tensor, n_layers: int) -> Tensor:
        """Pooled features [B,D] from the hidden states after the first `n_layers` layers."""
        return pool(self._through(self.layers()[n_layers:], hidden_BTD, mask_BT), mask_BT)

    def features(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Pooled features [B,D]."""
        if self.n_layers:
            return self.upper(self.lower(ids_BT, mask_BT, 0), mask_BT, 0)
        return pool(self.backbone(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state, mask_BT)

    @staticmethod
    def _through(layers: Sequence[nn.Module], hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        bias = None if bool(mask_BT.all()) else (~mask_BT)[:, None, None, :].to(hidden_BTD.dtype) * _MASKED
        for layer in layers:
            hidden_BTD = layer(hidden_BTD, bias)
        return hidden_BTD


def pool(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the real tokens, scaled to a root mean square of 1. In float32."""
    weight_BT1 = mask_BT[..., None].to(torch.float32)
    mean_BD = (hidden_BTD.float() * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
    return mean_BD * torch.rsqrt(mean_BD.square().mean(-1, keepdim=True) + 1e-12)


def set_dropout(model: nn.Module, p: float) -> None:
    """Live: one probability for every dropout of the model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def pad(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids -> ids [B,T] and a boolean mask [B,T]."""
    lengths = [len(r) for r in rows]
    ids_BT = np.full((len(rows), max(1, *lengths)), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        ids_BT[i, : len(row)] = row
    mask_BT = np.arange(ids_BT.shape[1])[None, :] < np.array(lengths)[:, None]
    return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)


def reads_both_ways(config: PretrainedConfig) -> bool:
    """Whether it is an encoder: no decoder's, and not of a type that only ever predicts the next token."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        return False
    return config.model_type in MASKED or config.model_type not in CAUSAL


def load_backbone(name: str) -> PreTrainedModel:
    """An encoder from a local folder or the hub ("org/name"), in float32, without dropout (training sets its own).

    Raises UserError when it cannot be had or is not an encoder.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    where = "a folder with config.json and model.safetensors, a hub name (org/name), or 'none'"
    try:
        config = AutoConfig.from_pretrained(name)
        if not reads_both_ways(config):
            raise UserError(f"model: {name!r} is not an encoder but {config.model_type!r}. Give an encoder: {where}.")
        model = AutoModel.from_pretrained(name, config=config, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"model: {name!r} cannot be loaded ({reason}). Give {where}.") from None
    if not hasattr(model.config, "hidden_size"):
        raise UserError(f"model: {name!r} ({model.config.model_type}) is not a text encoder. Give {where}.")
    if model.config.model_type in LAYERED:
        model.pooler = None  # not used, and random where the checkpoint has none
    set_dropout(model, 0.0)
    return model


def new_backbone(vocab_size: int, pad_id: int, width: int, layers: int, max_length: int, seed: int) -> PreTrainedModel:
    """A small BERT with random weights, for data that no pretrained encoder fits."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        intermediate_size=width * 4,
        max_position_embeddings=max_length,
        pad_token_id=pad_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertModel(config, add_pooling_layer=False)


def save_encoder(model: Encoder, folder: Path) -> None:
    """config.json and model.safetensors that AutoModel loads, and the head beside them."""
    from safetensors.torch import save_file

    model.backbone.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in model.head.state_dict().items()}, folder / "head.safetensors")


def load_encoder(folder: Path) -> Encoder:
    """What `save_encoder` wrote."""
    from safetensors.torch import load_file

    with reading(folder / "head.safetensors"):
        head = load_file(folder / "head.safetensors")
        n_outputs = head["weight"].shape[0]
    model = Encoder(load_backbone(str(folder)), n_outputs)
    with reading(folder / "head.safetensors"):
        model.head.load_state_dict(head)
    return model.eval()
