"""A label model in Keras: layers of Keras itself with our weights in them, ids and mask in, logits out, saved as model.keras.

The file loads with keras.saving.load_model in its safe mode: it holds no code. For BERT (post-norm, learned positions) and our LSTM.
Shapes: B rows, T tokens, D width, H heads, E width of a head, K outputs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from multistep.export.checked import TEXTS, check_logits
from multistep.export.labels import LabelModel, token_lines, write_readme
from multistep.models.encoder import Encoder, pad
from multistep.models.lstm import Lstm
from multistep.types import UserError

FILE = "model.keras"
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu"}


def to_keras(model: LabelModel, into: Path) -> str:
    """model.keras, the tokenizer and the labels. Raises UserError where Keras is missing or has no such model."""
    keras = _keras()
    twin = keras_twin(model)
    twin.save(str(into / FILE))
    model.save_beside(into)
    write_readme(
        into,
        "A text model in Keras",
        _README.format(says=model.says(), tokens=token_lines(model.encoder.pad_id, "int32")),
    )
    loaded = keras.saving.load_model(str(into / FILE), safe_mode=True)
    return check_logits(outputs(loaded, model, TEXTS), model.expected(TEXTS), "keras")


def outputs(twin: Any, model: LabelModel, texts: Any) -> np.ndarray:
    """Logits [N,K] of a Keras model."""
    ids_BT, mask_BT = pad(model.encoder.tokenize(texts), model.encoder.pad_id)
    return np.asarray(twin.predict([ids_BT.numpy().astype(np.int32), mask_BT.numpy().astype(np.int32)], verbose=0))


def _keras() -> Any:
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")  # the one backend that is certainly there
    try:
        import keras
    except ModuleNotFoundError as error:
        if error.name != "keras":
            raise UserError(f"keras: its backend {error.name} is not installed. Set KERAS_BACKEND=torch.") from None
        raise UserError("keras is not installed. Install it: pip install 'multistep[keras]'") from None
    return keras


def keras_twin(model: LabelModel) -> Any:
    """A functional Keras model with the weights of `model`. Raises UserError where it has no twin."""
    keras = _keras()
    network = model.network
    bert = isinstance(network, Encoder) and network.config.model_type == "bert"
    if bert and network.config.hidden_act not in _ACTIVATIONS:
        raise UserError(f"keras: the activation {network.config.hidden_act!r} has no twin. Use --to onnx.")
    if not bert and not isinstance(network, Lstm):
        kind = getattr(getattr(network, "config", None), "model_type", type(network).__name__)
        raise UserError(f"keras: there is no twin of a {kind}. Use --to onnx or --to folder.")
    ids = keras.Input((None,), dtype="int32", name="ids")
    mask = keras.Input((None,), dtype="int32", name="mask")
    twin = _Twin(keras)
    features = twin.bert(network, ids, mask) if bert else twin.lstm(network, ids, mask)
    head = network.head
    weights = [array(head.weight).T * model.scale, array(head.bias) * model.scale + model.shift]
    logits = twin.dense(features, weights, "head")
    found = keras.Model([ids, mask], logits, name="text_model")
    for layer, arrays in twin.laid_in:
        layer.set_weights([a.astype(np.float32) for a in arrays])
    return found


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


class _Twin:
    """Lays layers out and remembers the weights that belong into them: Keras makes its own when a layer is called."""

    def __init__(self, keras: Any):
        self.keras, self.layers, self.ops = keras, keras.layers, keras.ops
        self.laid_in: list[tuple[Any, list[np.ndarray]]] = []

    def _with(self, layer: Any, weights: list[np.ndarray]) -> Any:
        self.laid_in.append((layer, weights))
        return layer

    def embed(self, ids: Any, table_VD: np.ndarray, name: str) -> Any:
        return self._with(self.layers.Embedding(*table_VD.shape, name=name), [table_VD])(ids)

    def dense(self, x: Any, weights: list[np.ndarray], name: str, activation: str | None = None) -> Any:
        return self._with(self.layers.Dense(weights[0].shape[1], activation=activation, name=name), weights)(x)

    def linear(self, x: Any, module: Any, name: str, activation: str | None = None) -> Any:
        return self.dense(x, [array(module.weight).T, array(module.bias)], name, activation)

    def norm(self, x: Any, module: Any, name: str) -> Any:
        layer = self.layers.LayerNormalization(epsilon=module.eps, name=name)
        return self._with(layer, [array(module.weight), array(module.bias)])(x)

    def mean(self, states: Any, mask: Any) -> Any:
        """Over the real tokens [B,D]."""
        ops = self.ops
        weight = ops.expand_dims(ops.cast(mask, "float32"), -1)
        return ops.sum(states * weight, axis=1) / ops.maximum(ops.sum(weight, axis=1), 1.0)

    def bert(self, network: Any, ids: Any, mask: Any) -> Any:
        """Pooled features [B,D]."""
        ops, body = self.ops, network.backbone
        places = ops.cumsum(ops.ones_like(ids), axis=1) - 1
        position_PD = (
            array(body.embeddings.position_embeddings.weight) + array(body.embeddings.token_type_embeddings.weight)[:1]
        )  # every token is of type 0
        x = self.embed(ids, array(body.embeddings.word_embeddings.weight), "words")
        x = x + self.embed(places, position_PD, "places")
        x = self.norm(x, body.embeddings.LayerNorm, "words_norm")
        seen = ops.expand_dims(ops.cast(mask, "bool"), 1)
        heads = network.config.num_attention_heads
        for number, layer in enumerate(body.encoder.layer):
            mixed = self.attention(x, seen, layer.attention, heads, f"layer{number}_attention")
            x = self.norm(x + mixed, layer.attention.output.LayerNorm, f"layer{number}_attention_norm")
            activation = _ACTIVATIONS[network.config.hidden_act]
            inner = self.linear(x, layer.intermediate.dense, f"layer{number}_up", activation)
            inner = self.linear(inner, layer.output.dense, f"layer{number}_down")
            x = self.norm(x + inner, layer.output.LayerNorm, f"layer{number}_norm")
        mean = self.mean(x, mask)
        return mean * ops.rsqrt(ops.mean(ops.square(mean), axis=-1, keepdims=True) + 1e-12)

    def attention(self, x: Any, seen: Any, module: Any, heads: int, name: str) -> Any:
        own, out = module.self, module.output.dense
        width = own.query.weight.shape[0] // heads
        layer = self.layers.MultiHeadAttention(heads, width, name=name)
        weights = []
        for part in (own.query, own.key, own.value):
            weights += [array(part.weight).T.reshape(-1, heads, width), array(part.bias).reshape(heads, width)]
        weights += [array(out.weight).T.reshape(heads, width, -1), array(out.bias)]
        return self._with(layer, weights)(x, x, attention_mask=seen)

    def lstm(self, network: Any, ids: Any, mask: Any) -> Any:
        """The mean [B,D] of the hidden states. Keras has one bias, and its gates in torch's order."""
        part = network.lstm
        weights = [array(part.weight_ih_l0).T, array(part.weight_hh_l0).T, array(part.bias_ih_l0 + part.bias_hh_l0)]
        layer = self._with(self.layers.LSTM(network.shape.width, return_sequences=True, name="lstm"), weights)
        return self.mean(layer(self.embed(ids, array(network.embeddings.weight), "words")), mask)


_README = """
`model.keras` takes `ids` and `mask` (int32, a row a text; mask: 1 for tokens, 0 for what fills a row up) and gives the logits. It is
made of Keras's own layers and loads on any of its backends. `labels.json` has the labels in the order of the logits. {says}

```python
import json
import keras
import numpy as np
from tokenizers import Tokenizer

{tokens}
logits = keras.saving.load_model(f"{{folder}}/model.keras").predict([ids, mask], verbose=0)
```
"""
