"""Ways to train that are compared wherever methods are: baselines, sampling-free, and a start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsfvae.training.schedules import WarmStart


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Attributes:
        settings: of a `TrainConfig`.
        step: the recipe whose step it takes; "" for a step of its own.
        start: the recipe whose step its warm start takes; "" without one.
        is_baseline: whether it needs no Jacobian.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    step: str = ""
    start: str = ""
    is_baseline: bool = False

    @property
    def start_steps(self) -> int:
        """Steps of its warm start."""
        return WarmStart.parse(self.settings.get("warm_start", "")).steps


SAMPLING, ANTITHETIC = "sampling", "antithetic"
PRECISION, EXPECTED = "precision .5", "expected"
_PAIR = {"method": "sampling", "samples": 2, "draws": "antithetic"}


def warm_up(steps: int, weight: float = 0.2) -> Recipe:
    """Antithetic sampling behind so many steps at a smaller weight of the KL divergence."""
    # A schedule in steps of equal length: as long again at the final weight.
    schedule = {"kl_weight_schedule": f"steps:{weight:g}", "schedule_steps": 2 * steps}
    return Recipe(_PAIR | schedule, step=ANTITHETIC, is_baseline=True)


def warm_start(likelihood: str, steps: int) -> Recipe:
    """Antithetic sampling behind so many sampling-free steps."""
    start = {"precision": PRECISION, "expected": EXPECTED}[likelihood]
    return Recipe(_PAIR | {"warm_start": f"{likelihood}:{steps}"}, ANTITHETIC, start)


RECIPES: dict[str, Recipe] = {
    SAMPLING: Recipe({"method": "sampling"}, is_baseline=True),
    ANTITHETIC: Recipe(_PAIR, is_baseline=True),
    "4 orthogonal pairs": Recipe(
        {"method": "sampling", "samples": 8, "draws": "orthogonal"}, is_baseline=True
    ),
    "DReG, K=5": Recipe({"method": "dreg", "samples": 5}, is_baseline=True),
    "KL warm-up 250, antithetic": warm_up(250),
    "precision 100, antithetic": warm_start("precision", 100),
    "expected 100, antithetic": warm_start("expected", 100),
    PRECISION: Recipe({"likelihood": "precision"}),
    EXPECTED: Recipe({"likelihood": "expected"}),
}
# How long the start, or the warm-up, should be.
LENGTHS: dict[str, Recipe] = {
    "KL warm-up 100, antithetic": warm_up(100),
    **{f"precision {n}, antithetic": warm_start("precision", n) for n in (25, 50, 250)},
}
# Importance weights drawn from the linearised posterior, beside those drawn from the encoder's.
WEIGHTS: dict[str, Recipe] = {
    "IWAE, K=5": Recipe({"method": "iwae", "samples": 5}, is_baseline=True),
    **{
        f"IWAE, linearized, K={k}": Recipe(
            {"method": "iwae", "samples": k, "proposal": "linearized"}
        )
        for k in (1, 5)
    },
}


def scaled(recipe: Recipe, share: float) -> Recipe:
    """The recipe with a start and a warm-up that are this part as long, for a shorter training."""
    settings = dict(recipe.settings)
    if steps := recipe.start_steps:
        likelihood = settings["warm_start"].partition(":")[0]
        settings["warm_start"] = f"{likelihood}:{max(1, round(steps * share))}"
    if steps := settings.get("schedule_steps", 0):
        settings["schedule_steps"] = max(2, round(steps * share))
    return Recipe(settings, recipe.step, recipe.start, recipe.is_baseline)


def step_seconds_of(
    name: str, recipe: Recipe, steps: int, seconds: Mapping[str, float]
) -> float | None:
    """Seconds of so many steps of a recipe, by the time of a step of each recipe that was timed.

    Args:
        name: the recipe's.
        recipe: it.
        steps: how many.
        seconds: recipe -> seconds of its step.

    Returns:
        The seconds, or None where a step that it takes was not timed.
    """
    started = min(steps, recipe.start_steps)
    parts = [(steps - started, recipe.step or name), (started, recipe.start)]
    if any(count and of not in seconds for count, of in parts):
        return None
    return sum(count * seconds[of] for count, of in parts if count)
