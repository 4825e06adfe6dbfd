"""What the node agents of a run's jobs read: `launch.json` of the run directory, written by who submits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from asr_train.files import read_json, write_json
from asr_train.run_dir import RunDir
from launch import cluster as profiles
from launch.cluster_config import Cluster

Continuation = Literal["requeue", "successor", "none"]


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How a run's jobs are made.

    Attributes:
        code: folder of the program that they run.
        cluster_name: the profile, as it was asked for.
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


def settings_file(run: RunDir) -> Path:
    """Where a run's settings are; a run that was never a job has none."""
    return run.path / "launch.json"
