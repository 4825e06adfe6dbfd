"""The few numbers that say where a run is; all of them stand in every checkpoint, as JSON."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

# Direction of the metrics that `evaluate` and its users have for recognised text; of others the recipe must say it.
_LOWER_IS_BETTER = ("wer", "cer", "wer_raw", "cer_raw", "mer", "wil", "ter", "per", "loss", "perplexity")
_HIGHER_IS_BETTER = (
    "wip", "accuracy", "word_accuracy", "exact_match", "f1", "precision", "recall", "bleu", "sacrebleu", "google_bleu",
    "chrf", "meteor", "rouge1", "rouge2", "rougeL", "rougeLsum",
)  # fmt: skip


def higher_is_better(metric: str) -> bool | None:
    """Whether more of a metric, by its name without the set's, is better; None where that is not known."""
    return metric in _HIGHER_IS_BETTER if metric in (*_LOWER_IS_BETTER, *_HIGHER_IS_BETTER) else None


@dataclass(kw_only=True)
class TrainState:
    """Where a run is.

    `step` counts optimizer updates from the start of the run, skipped ones included; with the plan's constant number
    of steps an epoch it is also the position in the data. `spent_s` is rank 0's ledger of all attempts, part -> seconds
    (`ledger.PARTS`), without steps that were lost.
    """

    step: int = 0
    num_skipped_steps: int = 0
    num_skipped_in_a_row: int = 0
    num_infinite_losses: int = 0
    num_utterances: int = 0
    audio_s: float = 0.0
    spent_s: dict[str, float] = field(default_factory=dict)
    best_metric: str | None = None
    best_value: float | None = None
    best_step: int | None = None
    num_evaluations_since_best: int = 0
    last_evaluated_step: int = 0
    last_metric: str | None = None
    last_value: float | None = None
    num_failed_saves: int = 0
    num_failed_saves_in_a_row: int = 0

    def position(self, steps_per_epoch: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of the next step."""
        return divmod(self.step, steps_per_epoch)

    def take_evaluation(self, metric: str, value: float, *, higher_is_better: bool) -> bool:
        """Note an evaluation at the current step; True when it is the best so far."""
        self.last_metric, self.last_value = metric, value
        sign = -1 if higher_is_better else 1
        if metric == self.best_metric and self.best_value is not None and sign * value >= sign * self.best_value:
            self.num_evaluations_since_best += 1
            return False
        self.best_metric, self.best_value, self.best_step = metric, value, self.step
        self.num_evaluations_since_best = 0
        return True

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The state that `to_json` wrote; fields of later versions are passed over."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


def due(cadence: tuple[int, str] | None, step: int, steps_per_epoch: int) -> bool:
    """Whether something with this cadence (`recipe.parse_cadence`) is due after `step` updates."""
    if cadence is None or step == 0:
        return False
    number, unit = cadence
    return step % (number * (steps_per_epoch if unit == "epochs" else 1)) == 0
