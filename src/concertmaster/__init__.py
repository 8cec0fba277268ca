"""Concertmaster: a scheduler for agent workflows on mixed LLM fleets."""

__version__ = "0.1.0"
