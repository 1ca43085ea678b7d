"""Learning-rate schedules: progress of the segment in 0..1 -> multiplier of the learning rate. No torch.

To add one: copy the nearest file, add it to SCHEDULES and to the union."""

from typing import Annotated

from pydantic import Field

from multistep.schedules.constant import Constant
from multistep.schedules.cosine import Cosine
from multistep.schedules.exponential import Exponential
from multistep.schedules.inverse_sqrt import InverseSqrt
from multistep.schedules.linear import Linear
from multistep.schedules.one_cycle import OneCycle
from multistep.schedules.plateau import Plateau
from multistep.schedules.step import Step
from multistep.schedules.wsd import WSD

SCHEDULES = (Linear, Constant, Cosine, Step, Exponential, InverseSqrt, OneCycle, WSD, Plateau)
Schedule = Annotated[
    Linear | Constant | Cosine | Step | Exponential | InverseSqrt | OneCycle | WSD | Plateau,
    Field(discriminator="kind"),
]

__all__ = [
    "SCHEDULES", "WSD", "Constant", "Cosine", "Exponential", "InverseSqrt", "Linear", "OneCycle", "Plateau", "Schedule",
    "Step",
]  # fmt: skip
