"""Journal -> words, tables, a model card; and the progress line. Needs no torch, and nothing above `journal`."""

from multistep.report.card import card
from multistep.report.explain import explain, headline
from multistep.report.progress import Progress
from multistep.report.run import explain_run, summary_of_run
from multistep.report.summary import summary

__all__ = ["Progress", "card", "explain", "explain_run", "headline", "summary", "summary_of_run"]
