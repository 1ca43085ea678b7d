"""What is the matter with a run, from its numbers: a name, words, and what to do next. Rules only; nothing here trains or reads data."""

from multistep.diagnosis.base import NAMES, Diagnosis, Name
from multistep.diagnosis.confident import Suspects, suspects
from multistep.diagnosis.curves import Gain, Law, doubled, doubled_rows, fit_law

__all__ = ["NAMES", "Diagnosis", "Gain", "Law", "Name", "Suspects", "doubled", "doubled_rows", "fit_law", "suspects"]
