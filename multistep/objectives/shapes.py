"""What outputs and targets have to look like, checked in one place: torch would broadcast [B] against [B,1] without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from multistep.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # a target that does not count, as everywhere in torch


class Hidden(NamedTuple):
    """Outputs of a model of tokens whose logits [B,T,V], `states_BTD @ weight_VD.T`, are not made whole (`pieces.py`)."""

    states_BTD: Tensor
    weight_VD: Tensor


def aligned(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 and of the targets' shape; [B,1] and [B] are the same thing."""
    outputs, targets = outputs.float(), targets.float()
    if outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1:
        outputs = outputs.squeeze(-1)
    elif targets.ndim == outputs.ndim + 1 and targets.shape[-1] == 1:
        targets = targets.squeeze(-1)
    if outputs.shape != targets.shape:
        raise UserError(f"outputs {list(outputs.shape)} do not fit targets {list(targets.shape)}: give both one shape.")
    return outputs, targets


def row_means(loss: Tensor) -> Tensor:
    """[B, ...] -> [B]"""
    return loss.reshape(len(loss), -1).mean(1)


def class_ids(targets: Tensor) -> Tensor:
    """Targets [B] or [B,1] as int64 [B]."""
    if targets.is_floating_point() or targets.is_complex():
        raise UserError(f"targets are {targets.dtype}, but classes are whole numbers: give them as integers.")
    return (targets.squeeze(-1) if targets.ndim == 2 and targets.shape[1] == 1 else targets).long()


def positive(weights: tuple[float, ...], n_outputs: int, name: str, like: Tensor) -> Tensor:
    """The weights [K] of the K outputs."""
    if len(weights) != n_outputs:
        raise UserError(f"{name} has {len(weights)} numbers, the outputs are {n_outputs}: give one for each.")
    return like.new_tensor(weights)
