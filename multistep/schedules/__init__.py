"""Learning-rate schedules: progress of the segment in 0..1 -> multiplier of the learning rate. No torch.

To add one: copy the nearest file, add it to SCHEDULES and to the union."""

from typing import Annotated

from pydantic import Field

from multistep.schedules.constant import Constant
from multistep.schedules.linear import Linear

SCHEDULES = (Linear, Constant)
Schedule = Annotated[Linear | Constant, Field(discriminator="kind")]

__all__ = ["SCHEDULES", "Constant", "Linear", "Schedule"]
