"""What the node agents of a run's jobs read: `launch.json` of the run directory, written by who submits."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from asr_train.errors import RunError
from asr_train.files import read_json, write_json
from asr_train.run_dir import RunDir
from launch.site import cluster as profiles
from launch.site.cluster_config import Cluster

Continuation = Literal["requeue", "successor", "none"]
ALLOCATION: Final = "allocation/"  # in place of a profile; no file has such a name


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How a run's jobs are made.

    Attributes:
        code: folder of the program that they run.
        cluster_name: the profile, as it was asked for; `ALLOCATION` where the nodes were somebody's allocation.
        cluster: the profile, checked.
        continuation: how the run goes on in another job; "none" where that is left to a person, as in `salloc`.
    """

    code: Path
    cluster_name: str
    cluster: Cluster
    continuation: Continuation

    @property
    def site(self) -> Path:
        """Folder of what is learned of the cluster."""
        return profiles.site_folder(self.cluster, self.cluster_name)

    @property
    def is_of_allocation(self) -> bool:
        """Whether the run was not submitted, but trained in an allocation of `salloc` or of a batch script."""
        return self.cluster_name == ALLOCATION

    def write(self, run: RunDir) -> None:
        """Write it into a run directory."""
        write_json(
            settings_file(run),
            {
                "code": str(self.code),
                "cluster_name": self.cluster_name,
                "continuation": self.continuation,
                "cluster": profiles.to_json(self.cluster),
            },
        )

    @classmethod
    def read(cls, run: RunDir) -> "JobSettings":
        """What was written last."""
        values = read_json(settings_file(run))
        return cls(
            code=Path(values["code"]),
            cluster_name=values["cluster_name"],
            cluster=profiles.from_json(values["cluster"]),
            continuation=values["continuation"],
        )


def of_submission(run: RunDir) -> JobSettings:
    """What the jobs of a run that was submitted are like.

    Raises:
        RunError: it was trained without `submit`.
    """
    settings = JobSettings.read(run) if settings_file(run).exists() else None
    if settings is not None and not settings.is_of_allocation:
        return settings
    where = "on this machine" if settings is None else "in an allocation"
    raise RunError(
        f"{run.path} has no job to try again: it was trained {where}. The same `wavefleet train` goes on with it there,"
        f" and `wavefleet submit RECIPE run_dir={shlex.quote(str(run.path))} --cluster P` as a job"
    )


def settings_file(run: RunDir) -> Path:
    """Where a run's settings are; a run that was never a job has none."""
    return run.path / "launch.json"
