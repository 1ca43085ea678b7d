"""A long short-term memory over words, the mean of its hidden states, and a linear head. Forward only; knows no loss.

    i, f, o = sigmoid(..);  g = tanh(..);  c <- f c + i g;  h = o tanh(c)        all gates linear in the word and the last h

It reads from left to right, so what fills a row up behind its last token cannot reach the states before it. Embeddings start
small and forget gates open (bias 1), so that the memory of a long text is there from the first update on.

Source: Hochreiter and Schmidhuber 1997, "Long short-term memory"; forget gates: Gers, Schmidhuber, Cummins 2000; their bias:
Jozefowicz, Zaremba, Sutskever 2015. torch.nn.LSTM does the work, in training through `recurrence.lstm`.
Differs from the source: the head reads the mean of all states, not the last one alone (LOG.md).
Shapes: B examples, T tokens, D width, K outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from multistep.files import reading
from multistep.models.base import TextEncoder, zero_head
from multistep.models.recurrence import lstm
from multistep.types import Spec

LSTM = "lstm"  # the name in a configuration, in the journal and as the `model_type` of config.json
_EMBEDDING_STD = 0.05


class LstmShape(Spec):
    """config.json: `width` is that of the embeddings and of the hidden state."""

    model_type: str = LSTM
    vocab_size: int
    width: int
    pad_token_id: int


_PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Lstm(TextEncoder):
    """Embedding, one LSTM layer, mean, head. The head starts at zero; dropout is on the embeddings and on the mean."""

    in_bf16: ClassVar[bool] = False
    encode_tokens: ClassVar[int] = 16_384  # a step of the recurrence is a small product: many rows at once

    def __init__(self, shape: LstmShape, n_outputs: int):
        super().__init__()
        self.shape = shape
        self.embeddings = nn.Embedding(shape.vocab_size, shape.width, padding_idx=shape.pad_token_id)
        self.lstm = nn.LSTM(shape.width, shape.width, batch_first=True)
        self.dropout = nn.Dropout(0.0)
        self.head = zero_head(shape.width, n_outputs)
        with torch.no_grad():
            nn.init.normal_(self.embeddings.weight, std=_EMBEDDING_STD)
            self.embeddings.weight[shape.pad_token_id] = 0
            for name, parameter in self.lstm.named_parameters():
                if name.startswith("bias"):
                    nn.init.zeros_(parameter)
                if name == "bias_ih_l0":
                    parameter[shape.width : 2 * shape.width] = 1  # forget gates: torch's order is i, f, g, o

    @property
    def pad_id(self) -> int:
        return self.shape.pad_token_id

    def features(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The mean [B,D] of the hidden states of the real tokens; zero for a row of none."""
        with torch.autocast(ids_BT.device.type, enabled=False):  # not every processor has a recurrence in bf16
            hidden_BTD = self._states(self.dropout(self.embeddings(ids_BT)))
            weight_BT = mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
            return self.dropout(torch.einsum("btd,bt->bd", hidden_BTD, weight_BT))

    def _states(self, x_BTD: Tensor) -> Tensor:
        """Hidden states [B,T,D]. Training on a CPU goes through the kernel whose backward pass is faster."""
        if not torch.is_grad_enabled() or x_BTD.device.type != "cpu":
            return self.lstm(x_BTD)[0]
        kernel, recurrent, bias, more = (self.lstm.get_parameter(f"{n}_l0") for n in _PARTS)
        return lstm(x_BTD, kernel.T, recurrent.T, bias + more)[0]


def new_lstm(vocab_size: int, pad_id: int, width: int, n_outputs: int, seed: int) -> Lstm:
    """Random weights that come from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Lstm(LstmShape(vocab_size=vocab_size, width=width, pad_token_id=pad_id), n_outputs)


def save_lstm(model: Lstm, folder: Path) -> None:
    """config.json, model.safetensors (embeddings and recurrence) and head.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.shape.model_dump(), indent=1), encoding="utf-8")
    body = {n: p.contiguous() for n, p in model.state_dict().items() if not n.startswith("head.")}
    save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({n: p.contiguous() for n, p in model.head.state_dict().items()}, folder / "head.safetensors")


def load_lstm(folder: Path) -> Lstm:
    """What `save_lstm` wrote. Raises ValueError when it is damaged."""
    from safetensors.torch import load_file

    with reading(folder / "config.json"):
        shape = LstmShape(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with reading(folder / "head.safetensors"):
        head = load_file(folder / "head.safetensors")
        n_outputs = len(head["weight"])
    with reading(folder / "model.safetensors"):
        body = load_file(folder / "model.safetensors")
    model = Lstm(shape, n_outputs)
    try:
        model.load_state_dict({**body, **{f"head.{n}": p for n, p in head.items()}})
    except RuntimeError as error:
        raise ValueError(f"{folder}: not the weights of this config.json ({str(error).splitlines()[0]})") from None
    return model.eval()
