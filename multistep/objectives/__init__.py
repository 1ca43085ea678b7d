"""Objectives: what training minimises. (The metric that counts is another thing: see metrics.)

To add one: copy the nearest file, add it to OBJECTIVES and to the union."""

from typing import Annotated

from pydantic import Field

from multistep.objectives.binary_cross_entropy import BinaryCrossEntropy
from multistep.objectives.cross_entropy import CrossEntropy
from multistep.objectives.mse import MeanSquaredError

OBJECTIVES = (CrossEntropy, BinaryCrossEntropy, MeanSquaredError)
Objective = Annotated[CrossEntropy | BinaryCrossEntropy | MeanSquaredError, Field(discriminator="kind")]

__all__ = ["OBJECTIVES", "BinaryCrossEntropy", "CrossEntropy", "MeanSquaredError", "Objective"]
