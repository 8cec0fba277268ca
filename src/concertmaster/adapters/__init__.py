"""Workflow identity for agent frameworks: each adapter adds our headers to a framework's calls.

A framework is imported when its adapter is called, never before.
"""

from concertmaster.adapters.identity import Workflow

__all__ = ["Workflow"]
