"""Character error rate as an `evaluate` metric that loads without a network."""

from typing import Any

import datasets
import evaluate

from asr_train.metrics import count_characters


class Cer(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Character error rate of all texts together, from summed edit counts; 0 is perfect."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="",
            inputs_description="predictions, references: lists of texts of equal length",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, *, predictions: list[str], references: list[str], **_: Any) -> dict[str, float]:
        return {"cer": count_characters(references, predictions).error_rate}
