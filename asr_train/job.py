"""What one attempt works with."""

import time
from dataclasses import dataclass
from typing import Any

from asr_train.checkpoint import Saver
from asr_train.config import Recipe
from asr_train.data.corpus import Corpus
from asr_train.data.loader import TurnBatches
from asr_train.data.plan import Plan
from asr_train.ledger import Ledger
from asr_train.phase import PhaseFile
from asr_train.prometheus import PrometheusFile
from asr_train.run_dir import RunDir
from asr_train.stop import Requests, StopFlag
from asr_train.strategy import Parallel


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one attempt works with."""

    recipe: Recipe
    run: RunDir
    attempt: int
    corpus: Corpus
    plan: Plan
    parallel: Parallel
    batches: TurnBatches
    max_steps: int
    equal_lengths: bool
    saver: Saver
    stop: StopFlag
    requests: Requests | None  # rank 0's
    phase: PhaseFile
    ledger: Ledger
    prometheus: PrometheusFile  # rank 0's writes

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.parallel.rank == 0

    def forget(self, kind: str) -> None:
        """Take a request in control/ away; rank 0 does."""
        if self.requests is not None:
            self.requests.forget(kind)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; rank 0 does."""
        if self.is_main:
            self.run.log({"attempt": self.attempt, **line, "time": time.time()})
