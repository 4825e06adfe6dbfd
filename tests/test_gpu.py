"""What only a GPU can show: fp16 with its scaler, pinned copies, NCCL training with gloo saving. Skipped elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from asr_train import checkpoints, resources
from asr_train.files import read_json, read_jsonl
from asr_train.ledger import PARTS
from asr_train.loss import ctc_losses
from asr_train.peer_wait import PeerWait
from asr_train.run_dir import RunDir, read_metrics
from launch import cli

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def launch(recipe_file, config, *overrides):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
        "--config_file", str(resources.find("accelerate_configs", config)), "-m", "asr_train", str(recipe_file),
    ]  # fmt: skip
    environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*command, *overrides], env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def losses(run):
    return {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("config", ["one_gpu", "ddp", "fsdp2"])
def test_a_run_goes_on_with_its_scaler_and_the_same_losses(tiny_corpus, tiny_recipe_file, tmp_path, config, precision):
    recipe_file = tiny_recipe_file(
        max_steps=12, precision=precision, deterministic=True,
        **{"checkpoint.every": "4", "checkpoint.keep_last": 9, "log.every": 1},
    )  # fmt: skip
    run = RunDir(tmp_path / "run")
    launch(recipe_file, config, f"run_dir={run.path}")
    before = losses(run)
    assert len(before) == 12
    scale = read_json(run.checkpoints / "step-0000000012" / "state.json")["scaler"]
    assert (scale is not None) == (precision == "fp16")
    for checkpoint in checkpoints.whole(run.checkpoints):
        if checkpoint.step > 4:
            shutil.rmtree(checkpoint.path)
    run.done.unlink()
    launch(recipe_file, config, f"run_dir={run.path}")
    after = losses(run)
    for step, loss in before.items():
        assert abs(after[step] - loss) <= 1e-5 * abs(loss), step
    assert read_json(run.checkpoints / "step-0000000012" / "state.json")["scaler"] == scale
    generators = json.loads((run.checkpoints / "step-0000000012" / "generators" / "rank-0.json").read_text())
    assert generators["cuda"] is not None
    saved = [line for line in read_jsonl(run.metrics) if line.get("event") == "saved"]
    assert all(line["blocked_s"] <= line["seconds"] for line in saved)


@pytest.mark.parametrize("blank", [0, 2])
def test_cudnns_losses_and_gradients_are_those_of_torchs_kernel(blank):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 30, (size,), generator=generator) for size in (40, 1, 12, 0)] + [torch.full((60,), 5)]
    num_frames = torch.tensor([300, 40, 12, 7, 100])  # the last text needs 119
    num_labels = torch.tensor([len(text) for text in texts])
    logits = torch.randn(5, 300, 30, generator=generator).cuda()
    found = {}
    for backend in ("torch", "cudnn"):
        leaf = logits.clone().requires_grad_()
        losses, infinite = ctc_losses(leaf, num_frames, torch.cat(texts).cuda(), num_labels, blank, backend=backend)
        losses.sum().backward()
        found[backend] = losses.detach(), infinite, leaf.grad
    for of_torch, of_cudnn in zip(*found.values(), strict=True):
        assert torch.allclose(of_torch.float(), of_cudnn.float(), rtol=1e-4, atol=1e-5)
    assert found["cudnn"][1].tolist() == [False] * 4 + [True]


def test_gpu_and_cpu_make_the_same_run(tiny_corpus, tiny_recipe_file, tmp_path):
    recipe_file = tiny_recipe_file(max_steps=8, **{"log.every": 1})
    for config in ("one_gpu", "cpu"):
        launch(recipe_file, config, f"run_dir={tmp_path / config}")
    gpu, cpu = (losses(RunDir(tmp_path / config)) for config in ("one_gpu", "cpu"))
    for step, loss in cpu.items():
        assert abs(gpu[step] - loss) <= 1e-3 * abs(loss), step


def test_waiting_for_others_is_measured_on_the_device_and_asks_it_nothing():
    """Against the host's clock around the same work; the GPU is busy before and after it."""
    torch.cuda._sleep(1_000_000)  # loads what is loaded at first use
    torch.cuda.synchronize()
    begun = time.perf_counter()
    torch.cuda._sleep(500_000_000)
    torch.cuda.synchronize()
    expected_s = time.perf_counter() - begun
    wait = PeerWait(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(500_000_000)
        wait.gradients_are_there()
        torch.cuda._sleep(500_000_000)
        wait.sums_are_there()
        torch.cuda._sleep(500_000_000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert wait.read_s() == pytest.approx(expected_s, rel=0.2)


def test_the_ledger_of_a_gpu_adds_up(tiny_corpus, tiny_recipe_file, tmp_path):
    run = RunDir(tmp_path / "run")
    launch(tiny_recipe_file(max_steps=8, **{"log.every": 2}), "one_gpu", f"run_dir={run.path}")
    last = [line for line in read_jsonl(run.metrics) if line.get("event") == "ledger"][-1]
    for rank in last["ranks"]:
        assert sum(rank[f"{part}_s"] for part in PARTS) == pytest.approx(rank["wall_s"], rel=0.01)
        assert rank["compute_s"] > 0
        assert rank["memory_bytes"] > 0


WIDE = {
    "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072,
    "conv_dim": [512] * 7, "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_memory_that_a_plan_says_is_what_the_device_needs(
    tiny_corpus, tiny_recipe_file, tmp_path, capsys, precision, checkpointing
):
    """A model and units large enough for what libraries take besides to be a small part."""
    changes = {f"model.config.{key}": value for key, value in WIDE.items()}
    changes |= {"model.gradient_checkpointing": checkpointing, "precision": precision, "log.every": 1}
    recipe_file = tiny_recipe_file(max_steps=4, unit_audio_s=30, units_per_step=1, **changes)
    assert cli.main(["plan", str(recipe_file), "--processes", "1", "--gpu", "H200", "--json", "-q"]) == 0
    planned = json.loads(capsys.readouterr().out)["training"]["memory"][0]
    assert planned["gradient_checkpointing"] == checkpointing
    run = RunDir(tmp_path / "run")
    launch(recipe_file, "one_gpu", f"run_dir={run.path}")
    measured = max(line["memory_bytes"] for line in read_metrics(run) if "loss" in line)
    assert planned["total_bytes"] == pytest.approx(measured, rel=0.15)
