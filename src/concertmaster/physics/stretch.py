"""Decoding in closed form: how long many steps last, and what they take.

Steps are numbered. A sequence that decodes holds ``base + step`` KV tokens during a step, so
one number a sequence stays valid while it decodes. It takes a block every ``block_tokens``
steps, at a phase fixed by its base. It ends at a step known in advance.
"""

import math
from collections.abc import Container
from heapq import heappop, heappush


class Stretch:
    """Steps of one batch, back to back; each lasts longer than the last by the same amount.

    Attributes:
        start_s: When its first step began, which is the step under way.
        steps: How many it has; 0 if the engine is idle.
        first_s: How long the first lasts.
        growth_s: How much longer each next one lasts.
        end_s: When the last one ends.
    """

    __slots__ = ("end_s", "first_s", "growth_s", "start_s", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.start_s = self.end_s = self.first_s = self.growth_s = 0.0

    def begin(self, start_s: float, steps: int, first_s: float, growth_s: float) -> None:
        """Set all at once."""
        self.start_s = start_s
        self.steps = steps
        self.first_s = first_s
        self.growth_s = growth_s
        self.end_s = start_s + self.lasts_s(steps)

    def lasts_s(self, steps: int) -> float:
        """Seconds from the start to the end of that many steps."""
        return steps * self.first_s + self.growth_s * (steps * (steps - 1) / 2)

    def steps_done(self, now_s: float) -> int:
        """Count the steps that ended by ``now_s``; the last one never counts."""
        last = self.steps - 1
        passed_s, first_s, growth_s = now_s - self.start_s, self.first_s, self.growth_s
        if last <= 0 or passed_s < first_s:
            return 0
        linear_s = first_s - growth_s / 2
        root_s = math.sqrt(linear_s * linear_s + 2 * growth_s * passed_s)
        steps = min(last, int(2 * passed_s / (linear_s + root_s)))
        while steps < last and self.lasts_s(steps + 1) <= passed_s:
            steps += 1
        while steps and self.lasts_s(steps) > passed_s:
            steps -= 1
        return steps

    def skip(self, steps: int) -> None:
        """Make the step that follows ``steps`` steps the first."""
        self.start_s += self.lasts_s(steps)
        self.first_s += steps * self.growth_s
        self.steps -= steps

    def cut(self) -> None:
        """Make the first step the last."""
        self.steps = 1
        self.end_s = self.start_s + self.first_s


class DecodeBatch:
    """Sequences that decode, as sums: no method walks through them.

    Attributes:
        count: How many there are.
    """

    __slots__ = ("_base_sum", "_block_tokens", "_finishes", "_phases", "count")

    def __init__(self, block_tokens: int) -> None:
        self.count = 0
        self._base_sum = 0
        self._block_tokens = block_tokens
        self._phases = [0] * block_tokens
        self._finishes: list[tuple[int, int]] = []

    def add(self, base: int, last_step: int, admission: int) -> None:
        """Let a sequence in; ``admission`` names it in the heap of finishes."""
        self.count += 1
        self._base_sum += base
        self._phases[(1 - base) % self._block_tokens] += 1
        heappush(self._finishes, (last_step, admission))

    def remove(self, base: int) -> None:
        """Take a sequence out; its finish stays in the heap until it comes up."""
        self.count -= 1
        self._base_sum -= base
        self._phases[(1 - base) % self._block_tokens] -= 1

    def kv_tokens(self, step: int) -> int:
        """KV tokens that a step reads."""
        return self._base_sum + self.count * step

    def blocks_at(self, step: int) -> int:
        """Blocks that a step takes."""
        return self._phases[step % self._block_tokens]

    def blocks_after(self, step: int, steps: int) -> int:
        """Blocks that the ``steps`` steps after ``step`` take."""
        if not steps:
            return 0
        rounds, rest = divmod(steps, self._block_tokens)
        blocks = rounds * self.count
        for later in range(step + 1, step + 1 + rest):
            blocks += self._phases[later % self._block_tokens]
        return blocks

    def pop_finishes(self, step: int) -> list[int]:
        """Name those that end with this step, and some that left before, by admission."""
        admissions = []
        while self._finishes and self._finishes[0][0] <= step:
            admissions.append(heappop(self._finishes)[1])
        return admissions

    def steps_alike(self, step: int, room_blocks: int, running: Container[int]) -> int:
        """Count the steps from ``step`` on until one ends a sequence or finds too few blocks.

        Args:
            step: A step that has its blocks.
            room_blocks: Left for those that follow.
            running: Admissions of sequences that have not left.
        """
        finishes, phases, block_tokens = self._finishes, self._phases, self._block_tokens
        while finishes[0][1] not in running:
            heappop(finishes)
        most = finishes[0][0] - step + 1
        rounds = room_blocks // self.count
        steps = 1 + rounds * block_tokens
        if steps >= most:
            return most
        room_blocks -= rounds * self.count
        while steps < most:
            room_blocks -= phases[(step + steps) % block_tokens]
            if room_blocks < 0:
                break
            steps += 1
        return steps
