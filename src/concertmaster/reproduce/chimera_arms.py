"""What the study of model choice compares."""

RIVALS = ("vllm", "vllm+mlfq", "ltr", "random-model", "quality-only", "cascade")
ARMS = ("chimera", *RIVALS)

SLACKS = {
    "chimera:worth_s=0": "0",
    "chimera:worth_s=15": "15",
    "chimera": "40",
    "chimera:worth_s=100": "100",
}
"""The frontier, by what a right answer is worth: policy and its ``worth_s``."""

WITHOUT = {
    "least-tokens+stjf": "no choice by quality",
    "chimera:order=fcfs": "no forecast of length in the order",
    "chimera:rule=slack": "the same slack whatever the gain",
    "chimera:rule=paper": "load and slack as published",
    "chimera:escalate=no": "no escalation",
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
