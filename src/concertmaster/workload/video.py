"""Text to video: a language model writes the prompt of a clip, a diffusion model renders it.

The shape is that of SwarmX's text-to-video (Qwen3-8B, then Wan2.1-T2V-1.3B, which takes
17 to 137 s). A render is an answer whose tokens are denoising work: so many steps for each
of so many frames, whose length depends on resolution and duration, which the prompt says
most of the time.
"""

import random
from collections.abc import Mapping

from concertmaster.core.request import ModelName, WorkflowId
from concertmaster.core.settings import Reader, number, whole, word
from concertmaster.workload.drawing import hashes, hint, names, tokens
from concertmaster.workload.plan import Call, WorkflowPlan, cap_tokens

APP = "video"
WRITER_SYSTEM_TOKENS = 512
FEWEST_RENDER_TOKENS, MOST_RENDER_TOKENS = 3_600, 16_000

CLIPS: Mapping[str, tuple[float, int]] = {
    "480p, 3 seconds": (0.4, 4_200),
    "480p, 5 seconds": (0.25, 5_600),
    "720p, 3 seconds": (0.1, 10_500),
    "720p, 5 seconds": (0.25, 14_000),
}
"""Clips, how often each is wanted, and the median of its render's tokens."""

SCENES = (
    "a fox crosses a frozen river",
    "rain on a tram window at night",
    "a potter shapes a tall vase",
    "clouds race over a mountain pass",
    "two dancers in an empty station",
    "a lighthouse in heavy surf",
)

SETTINGS: Mapping[str, Reader] = {
    "workflows": whole(1),
    "told": number(0, 1),
    "writer": word,
    "renderer": word,
    "deadline_s": number(1e-3),
}
"""What may follow ``video:``."""


def draw(
    *,
    rng: random.Random,
    workflows: int = 300,
    told: float = 0.9,
    writer: str = "qwen3-8b",
    renderer: str = "wan2.1-t2v-1.3b",
    deadline_s: float | None = None,
) -> list[WorkflowPlan]:
    """Draw workflows.

    Args:
        rng: Fixes them.
        workflows: How many.
        told: How often a prompt names the clip that is made; else it names any.
        writer: Model that writes the prompt of the clip.
        renderer: Model that renders it.
        deadline_s: Seconds after arrival by which the clip is due.
    """
    return [
        WorkflowPlan(
            workflow_id=WorkflowId(name),
            app=APP,
            arrival_s=0.0,
            calls=_calls(name, ModelName(writer), ModelName(renderer), told, rng),
            deadline_s=deadline_s,
        )
        for name in names(APP, workflows, rng)
    ]


def _calls(
    name: str, writer: ModelName, renderer: ModelName, told: float, rng: random.Random
) -> tuple[Call, ...]:
    clips = list(CLIPS)
    clip = rng.choices(clips, [share for share, _ in CLIPS.values()])[0]
    text = f"A clip of {hint(clip, clips, told, rng)}: {rng.choice(SCENES)}."
    written = _written(name, text, writer, rng)
    return written, _render(text, written, renderer, CLIPS[clip][1], rng)


def _written(name: str, text: str, writer: ModelName, rng: random.Random) -> Call:
    prompt_tokens = WRITER_SYSTEM_TOKENS + tokens(40, 0.5, rng)
    output_tokens = tokens(180, 0.35, rng)
    return Call(
        stage=0,
        role="writer",
        models=(writer,),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_output_tokens=cap_tokens(output_tokens),
        prompt_text=text,
        prompt_chars=4 * prompt_tokens,
        prefix_hashes=hashes(f"{APP} writer", WRITER_SYSTEM_TOKENS, prompt_tokens, name),
    )


def _render(
    text: str, written: Call, renderer: ModelName, median_tokens: int, rng: random.Random
) -> Call:
    render_tokens = tokens(median_tokens, 0.12, rng, most=MOST_RENDER_TOKENS)
    return Call(
        stage=1,
        parents=(written.stage,),
        role="renderer",
        models=(renderer,),
        prompt_tokens=written.output_tokens,
        output_tokens=max(FEWEST_RENDER_TOKENS, render_tokens),
        max_output_tokens=MOST_RENDER_TOKENS,
        prompt_text=text,
        prompt_chars=4 * written.output_tokens,
    )
