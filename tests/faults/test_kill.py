"""A training process that is killed, three times, ends with the same bits as one that is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from nblib.train import read_checkpoint

STEPS = 360
TRAINING = f"""
import os, sys, time
import torch
import nblib as nb
from nblib.vae import VAE

def train(path, pause):
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def slowly(batch, generator):
        if pause:
            print("step", flush=True)
            time.sleep(pause)
        return (batch + 0.1 * torch.rand(batch.shape, generator=generator)).clamp(0, 1)

    data = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    nb.fit(VAE((1, 4, 4), 2, hidden=(8,), beta_warmup=150), data, steps={STEPS}, batch_size=8, ema=0.99,
           schedule="cosine", transform=slowly, eval_data=data, eval_every=100, checkpoint=path, checkpoint_every=5,
           progress=False)
"""
# Importing torch takes longer than the runs: one process imports it, and forks one for each run.
FORKS = """
import torch._dynamo  # the optimizers import it
nb.fit
for path in sys.stdin:
    pid = os.fork()
    if pid == 0:
        train(path.strip(), 0.002)
        os._exit(0)
    print("pid", pid, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def forks() -> Iterator[tuple[IO[str], IO[str]]]:
    command = [sys.executable, "-c", TRAINING + FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdin, process.stdout
        process.stdin.close()


def kill_a_run(path: Path, wait: float, forks: tuple[IO[str], IO[str]]) -> int:
    """Kill a process that trains a moment after its first steps; the step of the checkpoint that it leaves."""
    orders, lines = forks
    orders.write(f"{path}\n")
    orders.flush()
    seen: list[str] = []
    while seen.count("step\n") < 12 or not any(line.startswith("pid") for line in seen):
        seen.append(lines.readline())
        assert seen[-1], "the process ended by itself"
    pid = next(int(line.split()[1]) for line in seen if line.startswith("pid"))
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    while not (line := lines.readline()).startswith("ended"):
        assert line == "step\n"
    assert line == f"ended {-signal.SIGKILL}\n"
    step = read_checkpoint(path)[1]["history"]["step"]
    assert isinstance(step, int)
    return step


def test_three_kills_at_random_moments_do_not_change_a_bit(tmp_path: Path, forks: tuple[IO[str], IO[str]]) -> None:
    path, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    waits = [random.SystemRandom().uniform(0.0, 0.2) for _ in range(3)]
    steps = [kill_a_run(path, wait, forks) for wait in waits]
    assert 0 < steps[0] < steps[1] < steps[2] < STEPS, (steps, waits)
    space: dict[str, Any] = {}
    exec(TRAINING, space)
    for end in (path, whole):  # in this process: the bits do not depend on that either
        space["train"](str(end), 0)
    (one, info), (two, expected) = read_checkpoint(path), read_checkpoint(whole)
    assert info["history"]["step"] == STEPS
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), (name, steps, waits)
    for name in ("rows", "evals", "examples"):
        assert info["history"][name] == expected["history"][name], (name, steps, waits)
    averages = [name for name in one if name.startswith("ema.module.") and torch.is_floating_point(one[name])]
    assert any(not torch.equal(one[name], one[name.replace("ema.module.", "model.")]) for name in averages)
