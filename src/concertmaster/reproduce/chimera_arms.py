"""What the study of model choice compares."""

RIVALS = ("vllm", "vllm+mlfq", "ltr", "random-model", "quality-only", "cascade")
ARMS = ("chimera", *RIVALS)

SLACKS = {
    "chimera:worth_s=0": "0",
    "chimera:worth_s=15": "15",
    "chimera": "30",
    "chimera:worth_s=100": "100",
}
"""The frontier, by what a right answer is worth: policy and its ``worth_s``."""

UNGRADED = " ungraded"
"""Ends an arm whose forecasts of success are as trained: no grade of its traffic is learned."""

WITHOUT = {
    "least-tokens+stjf": "no choice by quality",
    "chimera:order=fcfs": "no forecast of length in the order",
    f"chimera{UNGRADED}": "success as trained, not calibrated by grades",
    "chimera:load=open": "load of open calls only, as published",
    "chimera:switch_cost=no": "no cost of leaving a model",
    "chimera:escalate=no": "no escalation",
    "chimera:rule=slack": "the same slack whatever the gain",
    "chimera:rule=paper": "load and slack as published",
}
"""What is left without a part, and which part."""

ORACLES = {
    "chimera:knows=length": "true lengths",
    "chimera:knows=success": "true success",
    "chimera:knows=both": "both",
}
"""The recipe with a part of its forecast from the truth."""

BUSY = 1.1
"""The load at which parts are taken out, oracles asked and slacks swept."""
