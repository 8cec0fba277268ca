"""Studies that repeat what others have published: cells to run, claims to check."""
