"""What a predictor may read of a planned call."""

from concertmaster.predictors.interface import Prompt
from concertmaster.workload.plan import Call


def prompt_of(call: Call) -> Prompt:
    """Return the recorded prompt; of one that was recorded in part, what there is of it.

    >>> prompt_of(Call(stage=0, prompt_tokens=9, output_tokens=1, max_output_tokens=1)).chars
    0
    """
    text = call.prompt_text
    return Prompt(text=text, chars=call.prompt_chars or len(text), after_tool=call.after_tool)
