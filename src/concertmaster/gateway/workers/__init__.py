"""Several processes on one port that move bytes, and one beside them that decides."""
