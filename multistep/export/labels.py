"""Exports of a bundle that gives labels or numbers by its encoder.

The predictor goes with it as far as it is a line over the encoder's outputs: a temperature or a straight line is folded into the graph;
thresholds are told in the README, since they move decisions and not probabilities. Anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from multistep.bundle import Bundle, load_encoder_text
from multistep.engines.graph import write_graph
from multistep.engines.labels import OnnxText, session_of
from multistep.engines.runtime import Runtime, check_installed
from multistep.evaluate import EncoderText
from multistep.export.checked import TEXTS, check_logits
from multistep.models.encoder import Encoder
from multistep.models.saved import save_model
from multistep.predictors import Affine, Predictor, Single, Temperature, Thresholds
from multistep.subwords import save_tokenizer
from multistep.tasks import Task
from multistep.types import UserError


@dataclass
class LabelModel:
    """`scale`, `shift`: what the outputs of the head are multiplied by, and what is added; `offsets`: of decisions, where there are."""

    encoder: EncoderText
    tokenizer: Tokenizer
    max_length: int
    task: Task
    scale: float
    shift: float
    offsets: tuple[float, ...]

    @property
    def network(self) -> Any:
        return self.encoder.model

    def expected(self, texts: Sequence[str]) -> np.ndarray:
        """Logits [N,K], or values of a regression [N,1], as the bundle gives them in float32."""
        return (self.encoder.logits(texts) - self.encoder.mean) / self.encoder.scale * self.scale + self.shift

    def save_beside(self, into: Path) -> None:
        """The tokenizer and the labels."""
        save_tokenizer(self.tokenizer, into, self.max_length)
        facts: dict[str, Any] = {
            "task": self.task.kind,
            "labels": list(self.task.labels),
            "max_length": self.max_length,
        }
        if self.offsets:
            facts["offsets"] = list(self.offsets)
        (into / "labels.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")

    def says(self) -> str:
        """How an answer comes of the logits, for a README."""
        match self.task.kind:
            case "regress":
                return "The one output of a text is the value itself."
            case "multilabel":
                cut = "above the label's number in `offsets` of `labels.json`" if self.offsets else "above 0.5"
                return f"The probability of each label is the sigmoid of its logit; a label is said where it is {cut}."
            case _:
                added = " after the numbers in `offsets` of `labels.json` are added to the log-probabilities"
                return (
                    "Probabilities are the softmax of the logits; the answer is the likeliest label"
                    + (added if self.offsets else "")
                    + "."
                )


def label_model(folder: Path, bundle: Bundle) -> LabelModel:
    """What can be exported of a bundle. Raises UserError where it is not an encoder's line."""
    line, used = _line(bundle.predictor), bundle.predictor.models()
    if "linear" in used:
        why = "the n-grams of a linear model are counted by multistep alone"
    elif line is None or used != ("encoder",):
        why = "only temperature, a straight line and thresholds over the encoder go into other programs"
    else:
        why = ""
    if why or line is None:
        what = f"{bundle.predictor.kind} of {' and '.join(used)}"
        raise UserError(
            f"{folder}: what predicts is {what}, and {why}. Copy the folder and use multistep.load or multistep serve."
        )
    encoder = replace(load_encoder_text(folder, bundle.info["encoder"], "cpu"), bf16=False)
    scale, shift, offsets = line
    return LabelModel(
        encoder, Tokenizer.from_file(str(folder / "tokenizer.json")), int(bundle.info["encoder"]["max_length"]), bundle.task,
        scale * encoder.scale, scale * encoder.mean + shift, offsets,
    )  # fmt: skip


def _line(predictor: Predictor) -> tuple[float, float, tuple[float, ...]] | None:
    """(scale, shift, offsets) of a predictor over one model's outputs; None where it is none."""
    match predictor:
        case Single():
            return 1.0, 0.0, ()
        case Temperature():
            inner, scale, shift, offsets = _line(predictor.inner), 1 / predictor.temperature, 0.0, ()
        case Affine():
            inner, scale, shift, offsets = _line(predictor.inner), predictor.slope, predictor.intercept, ()
        case Thresholds():
            inner, scale, shift, offsets = _line(predictor.inner), 1.0, 0.0, predictor.offsets
        case _:
            return None
    if inner is None or (offsets and inner[2]):
        return None
    if inner[2] and isinstance(predictor, Temperature):  # it leaves the decisions below as they are
        return None
    return scale * inner[0], scale * inner[1] + shift, offsets or inner[2]


def write_readme(into: Path, title: str, body: str) -> None:
    (into / "README.md").write_text(f"# {title}\n\n{body.strip()}\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------- folder


def to_folder(model: LabelModel, into: Path) -> str:
    """config.json and model.safetensors of the backbone, which AutoModel loads, the tokenizer, and head.safetensors."""
    save_model(model.network, into)
    model.save_beside(into)
    network = model.network
    lines = _ENCODER_LINES if isinstance(network, Encoder) else _LSTM_LINES
    if not isinstance(network, Encoder):
        facts = f"width {network.shape.width}"
    else:
        facts = f"class {type(network.backbone).__name__} of transformers"
    body = _FOLDER.format(facts=facts, says=model.says(), lines=lines.format(scale=model.scale, shift=model.shift))
    write_readme(into, "A text model", body)
    from multistep.models.saved import load_model

    loaded = replace(model, encoder=replace(model.encoder, model=load_model(into)))
    return check_logits(loaded.expected(TEXTS), model.expected(TEXTS), "folder")


_FOLDER = """
`model.safetensors` holds the body ({facts}), `head.safetensors` a linear layer, `labels.json` the labels in the order of the logits.
The body is not of a class with a head of its own: the features are the mean of the last hidden states, scaled to a root mean
square of 1 (transformers) or the mean alone (LSTM). These lines give the logits. {says}

```python
{lines}
```
"""

_ENCODER_LINES = """import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder, texts = ".", ["a text", "another one"]
model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
head = load_file(f"{{folder}}/head.safetensors")
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
mask = batch["attention_mask"][..., None].float()
mean = (hidden * mask).sum(1) / mask.sum(1)
features = mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + 1e-12)
logits = (features @ head["weight"].T + head["bias"]) * {scale!r} + {shift!r}"""

_LSTM_LINES = """import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

folder, texts = ".", ["a text", "another one"]
weights, head = load_file(f"{{folder}}/model.safetensors"), load_file(f"{{folder}}/head.safetensors")
table = weights.pop("embeddings.weight")
lstm = torch.nn.LSTM(table.shape[1], table.shape[1], batch_first=True)
lstm.load_state_dict({{name.removeprefix("lstm."): value for name, value in weights.items()}})
batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
mask = batch["attention_mask"][..., None].float()
with torch.no_grad():
    features = (lstm(table[batch["input_ids"]])[0] * mask).sum(1) / mask.sum(1)
logits = (features @ head["weight"].T + head["bias"]) * {scale!r} + {shift!r}"""


# ---------------------------------------------------------------------------------------------- onnx


def to_onnx(model: LabelModel, into: Path) -> str:
    """model.onnx (ids and mask in, logits out), the tokenizer and the labels."""
    check_installed(Runtime(runtime="onnx"))
    write_graph(model.network, into / "model.onnx", model.scale, model.shift)
    model.save_beside(into)
    write_readme(
        into,
        "A text model as an ONNX graph",
        _ONNX.format(says=model.says(), tokens=token_lines(model.encoder.pad_id, "int64")),
    )
    found = OnnxText(
        session_of(into / "model.onnx", torch.get_num_threads()), model.encoder.tokenize, model.encoder.pad_id,
        model.network.head.out_features, model.network.encode_tokens,
    )  # fmt: skip
    return check_logits(found.logits(TEXTS), model.expected(TEXTS), "onnx")


def token_lines(pad: int, whole: str) -> str:
    """Python that makes ids and mask of texts, of this whole-number type: for the READMEs of files that read such."""
    return f"""folder, texts = ".", ["a text", "another one"]
tokenizer = Tokenizer.from_file(f"{{folder}}/tokenizer.json")
tokenizer.enable_truncation(json.load(open(f"{{folder}}/labels.json", encoding="utf-8"))["max_length"])
tokenizer.enable_padding(pad_id={pad})
rows = tokenizer.encode_batch(texts)
ids, mask = (np.array([getattr(r, name) for r in rows], np.{whole}) for name in ("ids", "attention_mask"))"""


_ONNX = """
`model.onnx` takes `ids` and `mask` (int64, a row a text; mask: 1 for tokens, 0 for what fills a row up) and gives `logits`.
`labels.json` has the labels in the order of the logits. {says}

```python
import json
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

{tokens}
logits = onnxruntime.InferenceSession(f"{{folder}}/model.onnx").run(["logits"], {{"ids": ids, "mask": mask}})[0]
```
"""
