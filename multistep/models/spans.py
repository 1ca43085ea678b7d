"""An encoder with two outputs a token: how likely an answer starts there, and ends there. Forward only; knows no loss.

The first token stands for "no answer". On disk it is the *ForQuestionAnswering class of its kind, so that others load the folder and
get the same logits; one that has been trained to answer keeps its head when it is loaded, any other encoder gets one of zeros.
Source: Devlin et al. 2019 (BERT), arXiv 1810.04805, section 4.2. Differs from the source: nothing known.
Shapes: B rows, T tokens, D hidden width; the last dimension is (start, end).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multistep.models.base import zero_head
from multistep.models.encoder import LAYERED, reads_both_ways, set_dropout
from multistep.models.hub import loading
from multistep.types import UserError

_OFFSET = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "longformer",
    "mpnet",
)  # count positions from behind the padding token's id
_POSITIONS = 512  # where the configuration does not say how many there are
_NEVER = -1e9


class SpanEncoder(nn.Module):
    """`backbone`: a transformers encoder; `head`: D features to start and end."""

    def __init__(self, backbone: Any, head: nn.Linear):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.config: Any = backbone.config
        settings = self.config.to_dict()
        self.segmented = int(settings.get("type_vocab_size") or 0) > 1
        used_up = self.pad_id + 1 if self.config.model_type in _OFFSET else 0
        self.max_tokens = int(settings.get("max_position_embeddings") or _POSITIONS) - used_up

    @property
    def pad_id(self) -> int:
        return int(self.config.pad_token_id or 0)

    @property
    def n_layers(self) -> int:
        return len(self.layers())

    def layers(self) -> Sequence[nn.Module]:
        return list(self.backbone.encoder.layer) if self.config.model_type in LAYERED else []

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, segments_BT: Tensor) -> Tensor:
        """Logits [B,T,2] float32; very low where the mask is false."""
        if self.segmented:
            found = self.backbone(input_ids=ids_BT, attention_mask=mask_BT.long(), token_type_ids=segments_BT)
        else:
            found = self.backbone(input_ids=ids_BT, attention_mask=mask_BT.long())
        return self.head(found.last_hidden_state).float().masked_fill(~mask_BT[..., None], _NEVER)


def load_span_encoder(name: str | Path) -> SpanEncoder:
    """An encoder from a folder or the hub, in float32, without dropout (training sets its own). Raises UserError."""
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    with loading(str(name), "an encoder that answers questions"), torch.random.fork_rng(devices=[]):
        config = AutoConfig.from_pretrained(name)
        if not reads_both_ways(config):
            raise UserError(f"model: {str(name)!r} is not an encoder but {config.model_type!r}. Give an encoder.")
        model, report = AutoModelForQuestionAnswering.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    head = dict(model.named_children()).get("qa_outputs")
    if not isinstance(head, nn.Linear) or head.out_features != 2:
        raise UserError(
            f"model: {str(name)!r} ({config.model_type}) has no head for start and end. Give another encoder."
        )
    if any(key.startswith("qa_outputs.") for key in report["missing_keys"]):
        head = zero_head(head.in_features, 2)
    found = SpanEncoder(model.base_model, head)
    set_dropout(found, 0.0)
    return found.eval()


def new_span_encoder(vocab_size: int, pad_id: int, width: int, layers: int, max_length: int, seed: int) -> SpanEncoder:
    """A small BERT with random weights, for data that no pretrained encoder fits."""
    from multistep.models.encoder import new_backbone

    return SpanEncoder(new_backbone(vocab_size, pad_id, width, layers, max_length, seed), zero_head(width, 2))


def save_span_encoder(model: SpanEncoder, folder: Path) -> None:
    """config.json and model.safetensors, as AutoModelForQuestionAnswering reads them."""
    from transformers import AutoModelForQuestionAnswering

    config = copy.deepcopy(model.config)
    config.num_labels = 2  # of the head, whatever the encoder was trained for
    with torch.device("meta"):  # a shell without weights of its own
        whole = AutoModelForQuestionAnswering.from_config(config)
    setattr(whole, whole.base_model_prefix, model.backbone)
    whole.qa_outputs = model.head
    whole.save_pretrained(folder)
