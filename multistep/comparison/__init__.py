"""The comparison of optimizers: each tuned with the same share of time, trained from several seeds, judged after decay.

entrants (who, and the search for a knob) -> arena (what on) -> run (one training) -> book (rows on disk) -> statistics, page, plot."""
