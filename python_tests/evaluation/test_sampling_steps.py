"""Steps of sampling stay within the timesteps that the scheduler was trained with."""

from __future__ import annotations

import pytest

from unlearn_ext import InputError
from unlearn_ext.models.sampling import check_steps

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_number_of_steps_is_taken_or_refused_as_the_scheduler_can(spacing: str, offset: int) -> None:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=50, steps_offset=offset, timestep_spacing=spacing)
    for steps in (1, 7, 25, 49, 50):
        scheduler.set_timesteps(steps)
        if scheduler.timesteps.max() < len(scheduler.alphas_cumprod):
            check_steps("steps", steps, scheduler)
        else:
            with pytest.raises(InputError, match="take fewer"):
                check_steps("steps", steps, scheduler)


def test_stable_diffusions_offset_leaves_no_room_for_every_timestep() -> None:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, steps_offset=1)
    check_steps("steps", 999, scheduler)
    with pytest.raises(InputError, match="1000 steps, shifted by the scheduler, end past its 1000"):
        check_steps("steps", 1000, scheduler)
