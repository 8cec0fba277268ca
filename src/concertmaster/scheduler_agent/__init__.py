"""A scheduler inside another one: it is asked for a decision, and may be late or absent."""
