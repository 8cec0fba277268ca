"""What the study of model choice compares."""

RIVALS = ("vllm", "vllm+mlfq", "ltr", "random-model", "quality-only", "cascade")
ARMS = ("chimera", *RIVALS)

SLACKS = {
    "chimera:tau=0,tau_s=0": "0",
    "chimera:tau=0.3,tau_s=1": "0.3",
    "chimera": "1",
    "chimera:tau=2,tau_s=4": "2",
}
"""The frontier, by what a better model may cost: policy and its ``tau``."""

WITHOUT = {
    "least-tokens+stjf": "no choice by quality",
    "chimera:order=fcfs": "no forecast of length in the order",
    "chimera:rule=paper": "load as published",
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
