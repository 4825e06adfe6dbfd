"""The model that is trained: any CTC model of transformers that takes raw audio, behind one forward.

Shapes: B utterances, S samples, F frames, H channels of the encoder, V classes, L transformer layers.

What transformers would draw at random inside the model comes from outside, so that it belongs to the unit and not to
the process: SpecAugment masks and dropped layers. Dropouts stay where they are.
"""

import copy
import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812  the usual name
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from asr_train.chunked_encoder import run_in_chunks
from asr_train.conv_layout import order_gradients
from asr_train.data.batch import BatchSettings
from asr_train.data.spec_augment import MaskSettings
from asr_train.geometry import FrameGeometry

_SDPA = "wavefleet_sdpa"


def _padding_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> torch.Tensor | None:
    """Valid keys, bool [B, 1, 1, F].

    transformers' own asks the device whether anything is padded, a stall a unit, and spells the mask out for every
    query, F times the memory.
    """
    return None if attention_mask is None else attention_mask[:, None, None, :]


AttentionInterface.register(_SDPA, sdpa_attention_forward)
AttentionMaskInterface.register(_SDPA, _padding_mask)


class SpeechModel(nn.Module):
    """A transformers CTC model with masks, dropped layers and frozen parts as this program wants them.

    Attributes:
        hf: the transformers model; what is exported.
        transformer_frozen: when set, only the head is trained: all else runs without gradients, and gets zeros.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        *,
        normalize: bool,
        takes_attention_mask: bool,
        masks: MaskSettings | None = None,
        layerdrop: float = 0.0,
    ) -> None:
        super().__init__()
        self.hf = hf
        self.geometry = FrameGeometry(kernels=tuple(hf.config.conv_kernel), strides=tuple(hf.config.conv_stride))
        self.normalize = normalize
        self.takes_attention_mask = takes_attention_mask
        self.masks = masks
        self.layerdrop = layerdrop
        self.transformer_frozen = False
        self._time_mask: torch.Tensor | None = None
        self._feature_mask: torch.Tensor | None = None
        self._keep_layers: torch.Tensor | None = None
        self._take_over()

    @property
    def hidden_size(self) -> int:
        """Channels of the encoder."""
        return int(self.hf.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return len(self._layers())

    @property
    def batch_settings(self) -> BatchSettings:
        """What training batches of this model need."""
        return BatchSettings(
            geometry=self.geometry,
            normalize=self.normalize,
            masks=self.masks,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            layerdrop=self.layerdrop,
        )

    def forward(
        self,
        waveforms: torch.Tensor,
        num_samples: torch.Tensor,
        time_mask: torch.Tensor | None = None,
        feature_mask: torch.Tensor | None = None,
        keep_layers: torch.Tensor | None = None,
        *,
        is_padded: bool = True,
    ) -> torch.Tensor:
        """Logits [B, F, V] of waveforms float32 [B, S], zero behind `num_samples` int64 [B].

        One forward, its backward, then the next: masks and kept layers are the latest forward's.

        Args:
            waveforms: what `data.batch.input_values` gives.
            num_samples: length of each waveform; on another device than the waveforms it costs a copy.
            time_mask: bool [B, F], frames replaced by the model's learnt mask vector.
            feature_mask: bool [B, H], channels set to zero.
            keep_layers: bool [L], False where a transformer layer is skipped.
            is_padded: False says that every waveform has as many frames as the longest; then there is nothing to mask,
                and attention without a mask has faster kernels. The logits are those with the mask.
        """
        short = self._min_samples - waveforms.shape[1]
        if short > 0:
            waveforms = F.pad(waveforms, (0, short))
            if time_mask is not None:
                time_mask = F.pad(time_mask, (0, self.geometry.num_frames(waveforms.shape[1]) - time_mask.shape[1]))
        self._time_mask, self._feature_mask, self._keep_layers = time_mask, feature_mask, keep_layers
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.transformer_frozen):
            mask = self._frame_mask(waveforms, num_samples) if is_padded or short > 0 else None
            hidden = self._base(waveforms, attention_mask=mask).last_hidden_state
        head: Any = self.hf
        logits: torch.Tensor = head.lm_head(head.dropout(hidden))  # [B, F, V]
        unused = self._unused_parameters()
        return _WithZeroGradients.apply(logits, *unused) if unused else logits  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> "SpeechModel":
        """Training mode, but batch norms use their stored statistics, so that units stay independent."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def freeze_feature_encoder(self) -> None:
        """Never train the convolutions: no gradients, nothing kept of them, and a few utterances at a time."""
        self._base.feature_extractor.requires_grad_(False)
        run_in_chunks(self._base.feature_extractor)

    @property
    def _base(self) -> Any:
        return self.hf.base_model

    @property
    def _min_samples(self) -> int:
        """The shortest input that no layer refuses: one frame, or as many as sew squeezes into one."""
        num_frames = getattr(self.hf.config, "squeeze_factor", 1)
        return self.geometry.receptive_samples + (num_frames - 1) * self.geometry.stride_samples

    def _layers(self) -> nn.ModuleList:
        encoder = self._base.encoder
        return cast(nn.ModuleList, encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer)

    def _take_over(self) -> None:
        """Put our masks and dropped layers in the place of the model's own draws."""
        base, config = self._base, self.hf.config
        if config._attn_implementation == "sdpa":
            self.hf.set_attn_implementation(_SDPA)
        if hasattr(config, "layerdrop"):
            # the model's config keeps the chance, for the export; its encoder must not draw
            config.layerdrop = self.layerdrop
            base.encoder.config = copy.deepcopy(config)
            base.encoder.config.layerdrop = 0.0
        # transformers would ask for the gradient of the raw audio, which costs memory and has no use
        base.feature_extractor._requires_grad = False
        order_gradients(base.feature_extractor)
        base._mask_hidden_states = self._mask_hidden_states
        base._get_feature_vector_attention_mask = _as_it_is
        first = 0
        if config.model_type == "wavlm":
            first = 1  # its first layer makes the position bias of all others; transformers never skips it
            warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")  # its own doing, each step
        for index, layer in enumerate(self._layers()):
            if index >= first:
                layer.register_forward_hook(_LayerDrop(self, index))
        if config.model_type == "wav2vec2-conformer":
            base.encoder.pos_conv_embed.requires_grad_(False)  # transformers makes it and never uses it
        if hasattr(base, "masked_spec_embed") and (self.masks is None or self.masks.time_prob == 0):
            base.masked_spec_embed.requires_grad_(False)

    def _frame_mask(self, waveforms: torch.Tensor, num_samples: torch.Tensor) -> torch.Tensor | None:
        """Valid frames, bool [B, F]; at least one each, for attention over nothing is NaN."""
        if not self.takes_attention_mask:
            return None
        lengths = num_samples.to(waveforms.device, non_blocking=True)
        # floors of floors: the whole stack of convolutions is one floor
        num_frames = (lengths - self.geometry.receptive_samples) // self.geometry.stride_samples + 1
        frames = torch.arange(self.geometry.num_frames(waveforms.shape[1]), device=waveforms.device)
        return frames < num_frames.clamp(min=1)[:, None]

    def _mask_hidden_states(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """SpecAugment on the encoder's input [B, F, H], in place of the model's own."""
        if self._time_mask is not None:
            embedding = self._base.masked_spec_embed.to(hidden.dtype)
            hidden = torch.where(self._time_mask[:, :, None], embedding, hidden)
        if self._feature_mask is not None:
            hidden = hidden.masked_fill(self._feature_mask[:, None, :], 0.0)
        return hidden

    def _unused_parameters(self) -> list[nn.Parameter]:
        """Trained parameters that this forward gave no part in the logits."""
        if not torch.is_grad_enabled():
            return []
        if self.transformer_frozen:
            return [parameter for parameter in self._base.parameters() if parameter.requires_grad]
        embedding = getattr(self._base, "masked_spec_embed", None)
        return [embedding] if embedding is not None and embedding.requires_grad and self._time_mask is None else []


class _LayerDrop:
    """Forward hook of a transformer layer: where the layer is not kept, its output is its input.

    The layer is always computed, so that every process joins every collective and every parameter gets a gradient,
    zero when skipped.
    """

    def __init__(self, model: SpeechModel, index: int) -> None:
        self.model, self.index = model, index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        kept = self.model._keep_layers
        if kept is None:
            return output
        if isinstance(output, tuple):
            return (torch.where(kept[self.index], output[0], args[0]), *output[1:])
        return torch.where(kept[self.index], output, args[0])


class _WithZeroGradients(torch.autograd.Function):
    """Passes a tensor through, and gives parameters that it does not depend on a gradient of zeros.

    DDP waits for a gradient of every parameter that it was given; so it may stay without `find_unused_parameters`.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def _as_it_is(_: int, attention_mask: torch.Tensor, **__: Any) -> torch.Tensor:
    """`_get_feature_vector_attention_mask` of a model that is given the mask of the frames."""
    return attention_mask
