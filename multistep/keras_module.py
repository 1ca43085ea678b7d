"""A Keras 3 model on its torch backend as a module that `optimize` can copy, judge and train.

The module's parameters and buffers share their memory with the model's variables; the model itself is only asked as a function of
them (`stateless_call`), so copies of the module are cheap and the model is left as it was until the best weights are written.
While it is asked, LSTM layers run through models/recurrence.py and a final sigmoid or softmax is left out (`as_function`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import keras
import torch
from torch import Tensor, nn

from multistep.keras_compiled import ACTIVATIONS, Link, last_layer
from multistep.models.recurrence import has_bf16, lstm

LEAST = 1e-7  # a probability is read as a logit no further from 0 and 1 than this, as Keras does


class KerasModule(nn.Module):
    """`link`: what stands between logits and the model's outputs, and is undone here."""

    def __init__(self, model: Any, link: Link):
        super().__init__()
        self._held = (model,)  # in a tuple: the model is no part of the module
        self._link: Link = link
        self._names: tuple[list[str], list[str]] = ([], [])
        for n, variable in enumerate(model.trainable_variables):
            self._names[0].append(f"{n:03d}_{variable.name}")
            self.register_parameter(self._names[0][-1], nn.Parameter(variable.value.data))
        for n, variable in enumerate(model.non_trainable_variables):
            self._names[1].append(f"fixed_{n:03d}_{variable.name}")
            self.register_buffer(self._names[1][-1], variable.value.data)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits, or the outputs where there are none."""
        trained = [self.get_parameter(n) for n in self._names[0]]
        others = [self.get_buffer(n) for n in self._names[1]]
        given = inputs[0] if len(inputs) == 1 else list(inputs)
        with torch.autocast(inputs[0].device.type, enabled=False):  # bf16 is for the LSTM's products in training alone
            outputs, after = self._held[0].stateless_call(trained, others, given, training=self.training)
        if self.training:  # running statistics and the seeds of dropout
            with torch.no_grad():
                for before, now in zip(others, after, strict=True):
                    before.copy_(now)
        return _unlinked(outputs, self._link)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Its own parameters and buffers, and the same model to ask."""
        twin = type(self).__new__(type(self))
        nn.Module.__init__(twin)
        twin._held, twin._link, twin._names = self._held, self._link, self._names
        for name, parameter in self.named_parameters():
            twin.register_parameter(name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        for name, buffer in self.named_buffers():
            twin.register_buffer(name, buffer.clone())
        return twin.train(self.training)


def _unlinked(outputs: Tensor, link: Link) -> Tensor:
    match link:
        case "identity":
            return outputs
        case "sigmoid":
            return torch.logit(outputs, eps=LEAST)
        case "softmax":
            return torch.log(outputs.clamp(LEAST, 1 - LEAST))


@contextmanager
def as_function(model: Any, link: Link, bf16: bool = False) -> Iterator[Link]:
    """The model with fast LSTM layers and, where the last layer's activation is `link`, without it; all is put back at the end.

    Yields what is left of the link: "identity" where the activation could be left out. `bf16`: fast layers round the factors of
    their products while they are trained.
    """
    undo: list[Callable[[], None]] = []
    threads = torch.get_num_threads()
    try:
        for layer in model._flatten_layers():
            if _plain(layer):
                layer.__dict__["inner_loop"] = functools.partial(_inner_loop, layer, threads, bf16)
                undo.append(functools.partial(layer.__dict__.pop, "inner_loop"))
        if undo and _simple(model):
            places = [id(v) for v in (*model.trainable_variables, *model.non_trainable_variables)]
            model.__dict__["stateless_call"] = functools.partial(_stateless_call, model, places, threads, bf16)
            undo.append(functools.partial(model.__dict__.pop, "stateless_call"))
        if undo and threads > 1:  # which meet at every step; parts of a batch meet once
            torch.set_num_threads(1)
            undo.append(functools.partial(torch.set_num_threads, threads))
        last = last_layer(model)
        wanted = ACTIVATIONS.get(link)
        if (
            wanted is not None
            and isinstance(last, keras.layers.Dense | keras.layers.Activation)
            and last.activation is wanted
        ):
            undo.append(functools.partial(setattr, last, "activation", wanted))
            last.activation = keras.activations.linear
            link = "identity"
        yield link
    finally:
        for back in undo:
            back()


def gains_by_bf16(model: Any) -> bool:
    """Whether the model has a layer for recurrence.py, on a processor where that is faster in bf16."""
    return any(_plain(layer) for layer in model._flatten_layers()) and has_bf16()


def _plain(layer: Any) -> bool:
    """Whether it is an LSTM whose cell is the one of recurrence.py."""
    if type(layer) is not keras.layers.LSTM:
        return False
    cell = layer.cell
    same = cell.activation is keras.activations.tanh and cell.recurrent_activation is keras.activations.sigmoid
    return same and not cell.recurrent_dropout and layer.compute_dtype == "float32"


def _inner_loop(
    layer: Any, threads: int, bf16: bool, sequences: Any, initial_state: Any, mask: Any, training: bool = False
) -> Any:
    """What keras.layers.LSTM.inner_loop does, a part of the rows on each thread. Masked steps are Keras's own work."""
    if any(m is not None for m in (mask if isinstance(mask, list | tuple) else [mask])):
        return type(layer).inner_loop(layer, sequences, initial_state, mask, training)
    cell = layer.cell
    if training and layer.dropout:  # one mask for all steps
        sequences = sequences * cell.get_dropout_mask(sequences[:, 0, :])[:, None, :]
    if layer.go_backwards:
        sequences = torch.flip(sequences, dims=[1])
    kernel, recurrent = _tensor(cell.kernel), _tensor(cell.recurrent_kernel)
    bias = None if cell.bias is None else _tensor(cell.bias)
    every = layer.return_sequences
    outputs, last, carry = lstm(
        sequences,
        kernel,
        recurrent,
        bias,
        initial_state[0],
        initial_state[1],
        threads,
        bf16=bf16 and training,
        every=every,
    )
    return last, outputs if every else last[:, None], [last, carry]


def _simple(model: Any) -> bool:
    """Whether it is the tutorials': embeddings without a mask, LSTM layers that end in themselves, dense layers, all in float32."""
    if type(model) is not keras.Sequential or not model.built:
        return False
    for layer in model.layers:
        plain = _plain(layer) and not (layer.dropout or layer.stateful or layer.return_state or layer.go_backwards)
        words = type(layer) is keras.layers.Embedding and not layer.mask_zero and not layer.quantization_mode
        dense = type(layer) is keras.layers.Dense and not layer.quantization_mode and not layer.lora_enabled
        words = words and not layer.lora_enabled
        if not (plain or words or dense) or layer.compute_dtype != "float32":
            return False
    return type(model.layers[0]) is keras.layers.Embedding  # so that the inputs are what they have to be


def _stateless_call(
    model: Any, places: list[int], threads: int, bf16: bool, trained: list[Tensor], others: list[Tensor], inputs: Any,
    training: bool = False,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """What `stateless_call` does for a `_simple` model, without what Keras does around each layer (2 ms an update)."""
    values = dict(zip(places, [*trained, *others], strict=True))
    found, table = inputs, None
    for layer in model.layers:
        if type(layer) is keras.layers.Embedding:
            found, table = found.long(), values[id(layer.embeddings)]
            continue
        if type(layer) is keras.layers.LSTM:
            cell, every = layer.cell, layer.return_sequences
            bias = None if cell.bias is None else values[id(cell.bias)]
            outputs, last, _ = lstm(
                found, values[id(cell.kernel)], values[id(cell.recurrent_kernel)], bias, threads=threads,
                bf16=bf16 and training, every=every, table_VD=table,
            )  # fmt: skip
            found, table = outputs if every else last, None
            continue
        if table is not None:
            found, table = nn.functional.embedding(found, table), None
        found = found.float() @ values[id(layer.kernel)]
        found = layer.activation(found if layer.bias is None else found + values[id(layer.bias)])
    return found if table is None else nn.functional.embedding(found, table), others


def _tensor(variable: Any) -> Any:
    """The variable's value, inside of `stateless_call` the one given there."""
    return keras.ops.convert_to_tensor(variable)
