"""Models: forward only, they know no loss. linear (n-gram counts), encoder (a transformer with a head), head (its convex solve)."""
