"""LoRA: a frozen matrix plus a product of two thin ones that train.

    y = W x + (alpha / rank) B A x;   A [rank,in] random, B [out,rank] zero: it begins as the model that it adapts

Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", arXiv 2106.09685; peft does the work.
Differs from the source: every linear layer by default, not the attention's query and value alone (Schulman et al. 2025,
"LoRA without regret": adapters of the attention alone do worse).
Layers are changed in place, so that `model.model` and `model.lm_head` stay where they are. Files are those of peft.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from multistep.types import Spec, Tunable, UserError

if TYPE_CHECKING:
    from torch import nn

Targets = Literal["attention", "all"]
_NAME = "default"  # of the adapter inside of its layers, which could hold several
_PREFIX = "base_model.model."  # of the names in peft's files
_ATTENTION = ("attn", "attention")  # what the names of attention modules have in common
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Lora(Spec):
    rank: Annotated[int, Field(ge=1, le=1024), Tunable(1, 256, log=True)] = 16
    alpha: Annotated[float, Field(gt=0, le=4096)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1), Tunable(0.0, 0.5)] = 0.0  # on what goes into A
    targets: Targets = "all"  # linear layers: of the attention, or all but the output head


def add_adapter(model: Any, lora: Lora, seed: int = 0) -> None:
    """Give the model's layers an adapter, in place: the model computes what it did, and only the adapter's weights train.

    Raises UserError without peft, without a layer to adapt, and where there is an adapter already.
    """
    peft = _peft()
    if is_adapted(model):
        raise UserError("adapter: the model has an adapter already. Fold it in first (`merged`), or go on training it.")
    names, transposed = target_layers(model, lora.targets)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, fan_in_fan_out=transposed,
        bias="none", task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )  # fmt: skip
    _inject(peft, model, config, seed)


def load_adapter(model: Any, folder: Path) -> None:
    """Give the model the adapter of a folder, written here or by peft, in place; ready to go on training."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    peft = _peft()
    if is_adapted(model):
        raise UserError(f"adapter: {folder} on a model that has an adapter already. Load the base model anew.")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"adapter: {folder} cannot be loaded ({_line(error)}). It needs {_CONFIG} and {_WEIGHTS}."
        ) from None
    if not isinstance(config, peft.LoraConfig):
        raise UserError(f"adapter: {folder} is of kind {config.peft_type!s}. Only LoRA is read here.")
    config.inference_mode = False
    try:
        _inject(peft, model, config, seed=0)
        missing = peft.set_peft_model_state_dict(model, weights, adapter_name=_NAME)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"adapter: {folder} does not fit the model ({_line(error)}). Give the model it was trained on."
        ) from None
    lost = [n for n in missing.missing_keys if ".lora_" in n] + list(missing.unexpected_keys)
    if lost:
        raise UserError(f"adapter: {folder} does not fit the model ({len(lost)} weights, the first {lost[0]!r}).")


def save_adapter(model: Any, folder: Path, base: str = "") -> None:
    """adapter_config.json and adapter_model.safetensors, which PeftModel.from_pretrained loads onto the base.

    `base`: the folder or hub name of the model under the adapter; "": where the model says that it came from.
    """
    from safetensors.torch import save_file

    if not is_adapted(model):
        raise ValueError("save_adapter: the model has no adapter")
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(model.peft_config[_NAME])
    config.base_model_name_or_path = base or model.config.name_or_path
    config.inference_mode = True  # as peft writes it: who loads it does not train it
    config.save_pretrained(str(folder))
    weights = {_PREFIX + n.replace(f".{_NAME}.", "."): p.detach().cpu().contiguous() for n, p in adapter_weights(model)}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})


def merged(model: Any) -> Any:
    """A copy with the adapter folded into plain layers again, all of its parameters trainable as in any model."""
    from peft.tuners.lora import LoraLayer

    twin = copy.deepcopy(model)
    if not is_adapted(twin):
        return twin
    for name, layer in [(n, m) for n, m in twin.named_modules() if isinstance(m, LoraLayer)]:
        layer.merge()
        twin.set_submodule(name, layer.get_base_layer())
    del twin.peft_config
    twin.requires_grad_(True)
    return twin


def is_adapted(model: Any) -> bool:
    return any(True for _ in adapter_weights(model))


def adapter_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's parameters by name."""
    return ((n, p) for n, p in model.named_parameters() if f".{_NAME}." in n and ".lora_" in n)


def target_layers(model: Any, targets: Targets) -> tuple[list[str], bool]:
    """Names of the layers to adapt, in full or, where no other layer ends so, by their last parts; and whether their weights
    are stored transposed (GPT-2's Conv1D)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    modules = {n: m for n, m in model.named_modules() if n}
    # The exact classes: what is derived from them is often read by its raw weight (torch's attention does).
    wanted = {n: m for n, m in modules.items() if type(m) in (nn.Linear, Conv1D) and m is not head}
    if targets == "attention":
        wanted = {n: m for n, m in wanted.items() if any(a in n.lower() for a in _ATTENTION)}
    if not wanted:
        other = " Use targets='all'." if targets == "attention" else ""
        raise UserError(f"adapter: {model.config.model_type!r} has no linear layer for targets={targets!r}.{other}")
    last = sorted({n.rpartition(".")[2] for n in wanted})
    short = {n for n in modules if n.rpartition(".")[2] in last} == set(wanted)
    return last if short else list(wanted), any(type(m) is Conv1D for m in wanted.values())


def _inject(peft: Any, model: Any, config: Any, seed: int) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
    ours = {id(p) for _, p in adapter_weights(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ours)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError(
            "adapter: LoRA needs peft, which is not installed. Run: pip install 'multistep[lora]'"
        ) from None
    return peft


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
