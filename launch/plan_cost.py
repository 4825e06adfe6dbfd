"""What a planned training costs: hours, and how many jobs of a time limit, one after the other."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

from asr_train.forecast import Forecast, num_slices
from asr_train.forecast_warnings import ForecastWarning
from launch.plan_place import Place
from launch.site.cluster_config import Cluster
from launch.site.signal_lead import SLURM_SLACK_S

START_S: Final = 180.0
"""What a job is taken to need before its first step: the nodes' check, libraries, the model, the checkpoint."""


def cost(found: Forecast, place: Place) -> dict[str, Any]:
    """Hours of a training in all, as plain values."""
    total_s = found.chosen.total_s
    return {
        "kind": "GPU-hours" if place.on_gpu else "process-hours",
        "total_s": total_s,
        "hours": None if total_s is None else place.world_size * total_s / 3600,
    }


def cost_of_jobs(found: Forecast, place: Place, cluster: Cluster) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The same in jobs of a cluster, their starts counted; and what speaks against such jobs."""
    values = {**cost(found, place), "node_hours": None, "slices": None, "start_s": START_S}
    total_s, limit_s, lead_s = values["total_s"], 60.0 * cluster.time, float(cluster.signal_lead_s)
    if total_s is None:
        return values, []
    slices = num_slices(total_s, limit_s=limit_s, signal_lead_s=lead_s, start_s=START_S)
    if slices is None:
        text = (
            f"a job of {cluster.time} minutes, warned {lead_s:.0f} s before its end, has no time to train after "
            f"{START_S:.0f} s of start: set a longer cluster.time, or a shorter cluster.signal_lead_s"
        )
        return values, [asdict(ForecastWarning("no_time_to_train", text))]
    wall_s = total_s + slices * START_S
    gpus = cluster.nodes * cluster.gpus_per_node if place.on_gpu else place.world_size
    values |= {
        "slices": slices, "total_s": wall_s, "hours": gpus * wall_s / 3600, "node_hours": cluster.nodes * wall_s / 3600
    }  # fmt: skip
    return values, [asdict(each) for each in _job_warnings(found.chosen.step_s or 0.0, limit_s, lead_s)]


def _job_warnings(step_s: float, limit_s: float, lead_s: float) -> Iterator[ForecastWarning]:
    usable_s = limit_s - lead_s - START_S
    if step_s > usable_s:
        yield ForecastWarning(
            "long_step",
            f"a step takes {step_s:,.0f} s and a job has {usable_s:,.0f} s to train in: it may never come to save one; "
            "set a longer cluster.time, more nodes or fewer units_per_step",
        )
    needed_s = SLURM_SLACK_S + 2 * step_s
    if needed_s > lead_s:
        yield ForecastWarning(
            "short_signal_lead",
            f"signal_lead_s is {lead_s:.0f}, and two steps of {step_s:.3g} s may pass after Slurm's warning, which may "
            f"be {SLURM_SLACK_S} s off, and then comes the save: set cluster.signal_lead_s to more than {needed_s:.0f}",
        )
