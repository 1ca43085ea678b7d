"""From the last hidden states of a model of tokens to its logits.

Most models project their last hidden states by one matrix and do nothing else; then training projects only the positions that count,
or leaves it to the loss (`Hidden`). Some scale or cap the logits, or add a bias: those are asked for logits. Which it is, is tried
out on two tokens. Shapes: B rows, T positions, D width, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from multistep.objectives.shapes import Hidden

LEAST_VOCABULARY = 2048  # whole logits of fewer entries are no trouble
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def outputs_of(model: Any, inputs: dict[str, Any], counts_BT: Tensor | None, whole: bool) -> Tensor | Hidden:
    """Logits at the positions that count, [1,M,V], or at all of them, [B,T,V]. Not `whole`: those of a large vocabulary are left to
    the loss. `inputs`: what the model is called with."""
    if not projects_only(model):
        logits_BTV = model(**inputs, use_cache=False).logits
        return logits_BTV if counts_BT is None else logits_BTV[counts_BT][None]
    states_BTD = model.base_model(**inputs, use_cache=False).last_hidden_state
    if counts_BT is not None:
        states_BTD = states_BTD[counts_BT][None]
    head = model.get_output_embeddings()
    if whole or len(head.weight) < LEAST_VOCABULARY:
        return head(states_BTD)
    return Hidden(states_BTD, head.weight)


def projects_only(model: Any) -> bool:
    """Whether the model's logits are its output matrix applied to its last hidden states, and nothing more."""
    if model not in _plain:
        _plain[model] = _tried(model)
    return _plain[model]


@torch.no_grad()
def _tried(model: Any) -> bool:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or model.base_model is model:
        return False
    ids = torch.ones((1, 2), dtype=torch.long, device=head.weight.device)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    training = model.training
    model.eval()
    try:
        states = getattr(model.base_model(**inputs, use_cache=False), "last_hidden_state", None)
        return states is not None and torch.equal(head(states), model(**inputs, use_cache=False).logits)
    finally:
        model.train(training)
