"""Driver two: real time, HTTP on both sides."""
