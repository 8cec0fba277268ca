"""Learning from completions: labels, drift, challengers, training in the background."""
