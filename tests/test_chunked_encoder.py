"""A frozen feature encoder in chunks: the same features, and a peak that no longer grows with the unit."""

import weakref

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asr_train.chunked_encoder import run_in_chunks, widest_bytes


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make inside and that are still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known, self._foreign = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._foreign.add(tensor.untyped_storage()._cdata)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        if storage._cdata in self._known | self._foreign:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key, num_bytes):
        self._known.discard(key)
        self.now -= num_bytes


def encoder(**config):
    return tiny.model("wav2vec2", config, model={"freeze_feature_encoder": False}).hf.base_model.feature_extractor


def noise(num_utterances, num_samples=16_000):
    return torch.randn(num_utterances, num_samples, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("kind, difference", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_features_are_the_same_in_chunks_of_any_size_but_for_rounding(norm, kind, difference):
    """torch chooses its kernels by the number of utterances, so that last bits may differ."""
    precise = kind != torch.bfloat16
    whole = encoder(feat_extract_norm=norm).to(kind if precise else torch.float32)
    waveforms = noise(7).to(kind if precise else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
        expected = whole(waveforms).detach()
        for size in (1, 2, 3, 4):
            chunked = encoder(feat_extract_norm=norm).to(waveforms.dtype)
            run_in_chunks(chunked, chunk_bytes=size * widest_bytes(chunked, waveforms))
            found = chunked(waveforms)
            assert found.shape == expected.shape
            assert float((found - expected).abs().max()) <= difference * float(expected.abs().max()), size


def test_a_unit_of_one_chunk_gives_the_same_bits():
    whole, chunked = encoder(), encoder()
    run_in_chunks(chunked)
    assert torch.equal(chunked(noise(7)), whole(noise(7)))


def test_the_widest_layer_is_counted_as_it_is():
    module, seen = encoder(), []
    module.conv_layers[0].conv.register_forward_hook(lambda _, args, output: seen.append(output))
    waveforms = noise(3)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            module(waveforms)
            assert 3 * widest_bytes(module, waveforms) == seen[-1].untyped_storage().nbytes()


def test_the_peak_is_that_of_a_chunk_and_nothing_is_kept_also_under_gradient_checkpointing():
    def peak(num_utterances, chunks_of=None, checkpointing=False):
        model = tiny.model("wav2vec2", model={"gradient_checkpointing": checkpointing})
        module = model.hf.base_model.feature_extractor.requires_grad_(False)
        waveforms = noise(num_utterances)
        if chunks_of is not None:
            run_in_chunks(module, chunk_bytes=chunks_of * widest_bytes(module, waveforms))
        with LiveBytes() as live:
            features = module(waveforms)
        assert not features.requires_grad
        return live.peak, live.now - features.untyped_storage().nbytes()

    whole, _ = peak(16)
    small, left = peak(2)
    in_chunks, left_of_chunks = peak(16, chunks_of=2)
    assert (left, left_of_chunks) == (0, 0)
    features = 16 * 8 * 49 * 4  # utterances, channels, frames, bytes; twice while they are put together
    assert small <= in_chunks <= small + 2 * features
    assert in_chunks < whole / 4
    assert peak(16, chunks_of=2, checkpointing=True)[1] == 0


def test_a_frozen_model_takes_chunks_and_a_trained_one_gets_gradients():
    frozen, trained = (tiny.model(model={"freeze_feature_encoder": on}) for on in (True, False))
    for model in (frozen, trained):
        batch = tiny.batch_of([16_000, 12_000], model.batch_settings)
        model(batch.waveforms.float(), batch.num_samples).sum().backward()
        gradients = [each.grad is not None for each in model.hf.base_model.feature_extractor.parameters()]
        assert all(gradients) is (model is trained)
        assert any(gradients) is (model is trained)
