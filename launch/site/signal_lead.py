"""How early Slurm has to warn a job: what a run was measured to need, against the profile's `signal_lead_s`."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asr_train.files import read_jsonl
from asr_train.run_dir import RunDir

# Slurm counts limits in minutes and looks at them every 30 s; the warning may be 60 s off (man sbatch, --signal).
SLURM_SLACK_S = 60
_ROUND_S = 30  # what to set is said in multiples of this


@dataclass(frozen=True)
class Times:
    """The slowest of each that was measured, in seconds."""

    step_s: float
    save_s: float
    evaluation_s: float = 0.0

    @property
    def needed_s(self) -> int:
        """From the warning to a committed checkpoint at worst, and Slurm's slack.

        A warning may come as an evaluation begins, which is finished first. The ranks agree at the end of a step; when
        they just have, that of the next. A save that is under way is waited for, then the last one made.
        """
        return SLURM_SLACK_S + math.ceil(self.evaluation_s + 2 * self.step_s + 2 * self.save_s)

    def __str__(self) -> str:
        evaluation = f", an evaluation {self.evaluation_s:.3g} s" if self.evaluation_s else ""
        return f"a step takes up to {self.step_s:.3g} s, a save {self.save_s:.3g} s{evaluation}"


def measured(run: RunDir) -> Times | None:
    """The slowest step, save and evaluation of a run; each of the newest attempt that has one.

    None until a step and a save were timed. An attempt's first training line holds what starting costs, and counts only
    where there is no other.
    """
    steps: dict[int, list[float]] = defaultdict(list)
    saves: dict[int, list[float]] = defaultdict(list)
    evaluations: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for line in read_jsonl(run.metrics):
        attempt = line.get("attempt", 0)
        if "step_time_s" in line:
            steps[attempt].append(line["step_time_s"])
        elif line.get("event") == "saved":
            saves[attempt].append(line["seconds"])
        elif "set" in line and "seconds" in line:
            evaluations[attempt][line["step"]] += line["seconds"]
    if not steps or not saves:
        return None
    newest = steps[max(steps)]
    return Times(
        max(newest[1:] or newest),
        _newest_max(saves),
        _newest_max({attempt: list(found.values()) for attempt, found in evaluations.items()}),
    )


def problem(times: Times, signal_lead_s: int) -> str | None:
    """Why a lead is too short for these times, both figures and what to set; None when it is long enough."""
    if signal_lead_s >= times.needed_s:
        return None
    enough_s = math.ceil(times.needed_s / _ROUND_S) * _ROUND_S
    return (
        f"signal_lead_s is {signal_lead_s}, and up to {times.needed_s} s are needed to save after Slurm's warning "
        f"({times}, and Slurm may be {SLURM_SLACK_S} s off): set cluster.signal_lead_s={enough_s}, or in the profile"
    )


def problem_of(run: RunDir, signal_lead_s: int) -> str | None:
    """Why a lead is too short for what a run was measured to need; None where it is not, or nothing is known."""
    times = measured(run)
    return None if times is None else problem(times, signal_lead_s)


def _newest_max(found: Mapping[int, Sequence[float]]) -> float:
    return max(found[max(found)]) if found else 0.0
