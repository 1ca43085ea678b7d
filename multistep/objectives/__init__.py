"""Objectives: what training minimises. (The metric that counts is another thing: see metrics.)

To add one: copy the nearest file, add it to OBJECTIVES and to the union."""

from typing import Annotated

from pydantic import Field

from multistep.objectives.binary_cross_entropy import BinaryCrossEntropy
from multistep.objectives.cross_entropy import CrossEntropy
from multistep.objectives.distill import Distill
from multistep.objectives.fgm import FGM
from multistep.objectives.huber import Huber
from multistep.objectives.mae import MeanAbsoluteError
from multistep.objectives.mse import MeanSquaredError
from multistep.objectives.next_token import NextToken
from multistep.objectives.penalized import Penalized
from multistep.objectives.r_drop import RDrop
from multistep.objectives.seq2seq import Seq2Seq
from multistep.objectives.span import Span
from multistep.objectives.wrapper import Wrapper

WRAPPERS = (RDrop, FGM, Penalized)
OBJECTIVES = (
    CrossEntropy, BinaryCrossEntropy, MeanSquaredError, MeanAbsoluteError, Huber, NextToken, Seq2Seq, Span, Distill, *WRAPPERS,
)  # fmt: skip
Objective = Annotated[
    CrossEntropy | BinaryCrossEntropy | MeanSquaredError | MeanAbsoluteError | Huber
    | NextToken | Seq2Seq | Span | Distill | RDrop | FGM | Penalized,
    Field(discriminator="kind"),
]  # fmt: skip
for _member in (Wrapper, *WRAPPERS):  # the wrappers name all of them; only here are all of them known
    _member.model_rebuild(force=True, _types_namespace={"Objective": Objective})

__all__ = [
    "FGM", "OBJECTIVES", "WRAPPERS", "BinaryCrossEntropy", "CrossEntropy", "Distill", "Huber", "MeanAbsoluteError",
    "MeanSquaredError", "NextToken", "Objective", "Penalized", "RDrop", "Seq2Seq", "Span",
]  # fmt: skip
