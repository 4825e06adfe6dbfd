"""What submitit stores for a job and runs once on every node: a module's name and a run directory, nothing else."""

import importlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """The picklable task: `run_task` of a module, called with a run directory."""

    module: str
    run_dir: str

    def __call__(self) -> None:
        """Do this node's part; what is raised fails the job."""
        importlib.import_module(self.module).run_task(Path(self.run_dir))
