"""What is asked of a text and what is right: the task turns labels into targets and outputs into answers.

To add one: copy the nearest file, name it here, run the laws. No torch here.
"""

from typing import Annotated

from pydantic import Field

from multistep.tasks.classify import Classify
from multistep.tasks.multilabel import Multilabel
from multistep.tasks.regress import Regress

TASKS = (Classify, Multilabel, Regress)
Task = Annotated[Classify | Multilabel | Regress, Field(discriminator="kind")]

__all__ = ["TASKS", "Classify", "Multilabel", "Regress", "Task"]
