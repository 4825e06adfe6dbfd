"""The CTC loss of each utterance, in float32 whatever the arithmetic of the model."""

import torch
import torch.nn.functional as F  # noqa: N812  the usual name


def ctc_losses(
    logits: torch.Tensor,
    num_frames: torch.Tensor,
    labels: torch.Tensor,
    num_labels: torch.Tensor,
    blank_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CTC loss of each utterance over its number of labels; their mean over a step's utterances is the training loss.

    An utterance that cannot be aligned has an infinite loss; it is counted, and its loss and gradient are zero. NaN is
    not hidden. The lengths stay on the host: torch's kernels want them there, and a copy back would stall the device.

    Args:
        logits: [B, F, V], any float type; float64 stays float64, all others are taken to float32.
        num_frames: int64 [B], on the host; frames of each utterance that count.
        labels: int64 [sum of num_labels], of all utterances, one after the other.
        num_labels: int64 [B], on the host.
        blank_id: the class that stands for no label.

    Returns:
        losses [B]; infinite, bool [B], on the device of the logits.

    Source: Graves et al. 2006, "Connectionist Temporal Classification"; the division by the label count, at least 1,
    is that of torch's `reduction="mean"`, which transformers' `ctc_loss_reduction="mean"` uses.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if torch.are_deterministic_algorithms_enabled():
            log_probabilities = log_probabilities.cpu()  # torch's CUDA kernel has no deterministic backward, and raises
        device = log_probabilities.device
        losses = F.ctc_loss(
            log_probabilities.transpose(0, 1),  # [F, B, V]
            labels.to(device=device, dtype=torch.int64, non_blocking=True),  # int32 could choose cuDNN's
            num_frames,
            num_labels,
            blank=blank_id,
            reduction="none",
        )
    infinite = torch.isinf(losses)
    if log_probabilities.requires_grad:
        # the gradient of an infinite loss is NaN, also when multiplied by zero
        log_probabilities.register_hook(lambda gradient: gradient.masked_fill(infinite[:, None, None], 0.0))  # type: ignore[no-untyped-call]
    share = num_labels.clamp(min=1).to(device=device, dtype=losses.dtype, non_blocking=True)
    losses = losses.masked_fill(infinite, 0.0) / share
    return losses.to(logits.device), infinite.to(logits.device)
