"""How many processes a step has work for; without numpy, for commands that answer at once."""

from asr_train.errors import RecipeError


def check_world_size(units_per_step: int, world_size: int, allow_idle_ranks: bool, *, fewer: str | None = None) -> None:
    """Refuse more processes than a step has units.

    Args:
        units_per_step: of the recipe.
        world_size: processes, on all nodes.
        allow_idle_ranks: the recipe's word that it may be so.
        fewer: how fewer processes are asked for; `--processes` when None.

    Raises:
        RecipeError: some processes would never have work, and the recipe does not accept that.
    """
    if world_size <= units_per_step or allow_idle_ranks:
        return
    times = world_size / units_per_step
    words = {2.0: "twice", 3.0: "three times", 4.0: "four times", 8.0: "eight times"}
    raise RecipeError(
        f"units_per_step={units_per_step} keeps {units_per_step} of {world_size} processes busy: "
        f"{fewer or f'use --processes {units_per_step}'}, or units_per_step={world_size} "
        f"({words.get(times, f'{times:.3g} times')} the batch; reconsider lr)"
    )
