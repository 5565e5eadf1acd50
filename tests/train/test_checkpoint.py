"""Checkpoints: a stopped run ends with the same bits, a damaged file is refused, a full disk costs nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import nblib as nb
from nblib.errors import CheckpointError, NonFiniteLoss
from nblib.train import History, LossOut, load_weights, read_checkpoint, save_checkpoint
from nblib.vae import VAE

SHAPE = (1, 4, 4)
IMAGES = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(7))
SETTINGS: dict[str, Any] = {"steps": 24, "batch_size": 6, "lr": 0.01, "checkpoint_every": 5, "log_every": 3}


def vae(**settings: Any) -> VAE:
    torch.manual_seed(0)
    return VAE(SHAPE, 2, **{"hidden": (6,), **settings})


def run(path: Path | None, model: nn.Module | None = None, **settings: Any) -> History:
    return nb.fit(model or vae(beta_warmup=9), IMAGES, checkpoint=path, **{**SETTINGS, **settings})


class Stop(Exception):
    pass


class StopsAt:
    """A transform that lets a number of batches pass; the first one belongs to the check before the first step."""

    def __init__(self, step: int | None) -> None:
        self.left = math.inf if step is None else step + 1

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise Stop
        return (batch + 0.1 * torch.rand(batch.shape, generator=generator)).clamp(0, 1)


def bits(history: History) -> dict[str, Any]:
    assert history.model is not None
    state = {f"model.{name}": value for name, value in history.model.state_dict().items()}
    if history.ema is not None:
        state |= {f"ema.{name}": value for name, value in history.ema.state_dict().items()}
    return state


def assert_same(one: History, two: History) -> None:
    a, b = bits(one), bits(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    for name in ("rows", "evals", "step", "examples"):
        assert getattr(one, name) == getattr(two, name), name


# --- stopped and continued -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "adagrad", "sgd"])
@pytest.mark.parametrize("stop", [5, 12, 23])
def test_a_stopped_run_that_goes_on_ends_with_the_same_bits(stop: int, optimizer: str, tmp_path: Path) -> None:
    settings = {"ema": 0.9, "schedule": "cosine", "warmup": 3, "clip": 1.0, "optimizer": optimizer, "weight_decay": 0.1}
    whole = run(tmp_path / "whole.safetensors", transform=StopsAt(None), **settings)
    path = tmp_path / "stopped.safetensors"
    with pytest.raises(Stop):
        run(path, transform=StopsAt(stop), **settings)
    assert read_checkpoint(path)[1]["history"]["step"] == stop // 5 * 5
    assert_same(run(path, transform=StopsAt(None), **settings), whole)


def test_a_run_stopped_in_an_evaluation_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    def stop(step: int, _: nn.Module) -> None:
        if step == 16:
            raise Stop

    settings = {"eval_data": IMAGES, "eval_every": 4, "ema": 0.9, "schedule": "cosine"}
    whole = run(tmp_path / "whole.safetensors", **settings)
    path = tmp_path / "stopped.safetensors"
    with pytest.raises(Stop):
        run(path, callback=stop, **settings)
    assert_same(run(path, **settings), whole)


def test_a_stopped_bf16_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole = run(None, transform=StopsAt(None), precision="bf16")
    path = tmp_path / "stopped.safetensors"
    with pytest.raises(Stop):
        run(path, transform=StopsAt(11), precision="bf16")
    again = run(path, transform=StopsAt(None), precision="bf16")
    for name, value in bits(whole).items():
        assert torch.equal(bits(again)[name], value), name


def test_without_the_optimizers_state_the_bits_would_differ(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.safetensors")
    path = tmp_path / "stopped.safetensors"
    run(path, steps=10)
    tensors, info = read_checkpoint(path)
    kept = {k: torch.zeros_like(v) if k.startswith("optim.") else v for k, v in tensors.items()}
    save_checkpoint(path, kept, info)
    assert not torch.equal(bits(run(path))["model.encoder.1.weight"], bits(whole)["model.encoder.1.weight"])


def test_the_initial_weights_do_not_matter_when_a_run_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.safetensors")
    path = tmp_path / "stopped.safetensors"
    run(path, steps=10)
    other = vae(beta_warmup=9)
    nn.init.constant_(other.encoder[1].weight, 3.0)
    assert_same(run(path, other), whole)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "done.safetensors"
    whole = run(path)
    before = path.read_bytes()
    assert_same(run(path), whole)
    assert path.read_bytes() == before


def test_more_steps_continue_a_finished_run_with_a_constant_rate(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    run(path, steps=10)
    history = run(path, steps=24)
    assert_same(history, run(tmp_path / "whole.safetensors"))
    assert history.seconds > 0


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("lr", 0.01, 0.02), ("seed", 0, 1), ("batch_size", 6, 5), ("optimizer", "adamw", "sgd"), ("ema", None, 0.9),
        ("clip", None, 1.0), ("weight_decay", 0.0, 0.1), ("warmup", 0, 4), ("precision", "float32", "bf16"),
        ("schedule", "constant", "cosine"),
    ],
)  # fmt: skip
def test_going_on_with_other_settings_names_both_values(name: str, one: Any, two: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    run(path, **{"steps": 5, name: one})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"a run with {name}={one}, this one has {name}={two}"):
        run(path, **{name: two})
    assert path.read_bytes() == before


def test_a_cosine_run_cannot_go_on_with_other_steps(tmp_path: Path) -> None:
    run(tmp_path / "c", steps=5, schedule="cosine")
    with pytest.raises(CheckpointError, match="steps=5, this one has steps=24"):
        run(tmp_path / "c", schedule="cosine")


def test_going_on_with_other_data_names_the_number_of_examples(tmp_path: Path) -> None:
    run(tmp_path / "c", steps=5)
    with pytest.raises(CheckpointError, match="examples=20, this one has examples=10"):
        nb.fit(vae(), IMAGES[:10], checkpoint=tmp_path / "c", **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hidden": (7,)}, r"'encoder\.1\.weight' is \(6, 16\) in the file and \(7, 16\) in the model"),
        ({"hidden": ()}, r"'encoder\.1\.weight' is \(6, 16\) in the file and \(4, 16\) in the model"),
        ({"likelihood": "gaussian"}, r"'likelihood\.log_std' is absent in the file and \(\) in the model"),
        ({"hidden": (6, 6)}, r"'encoder\.3\.weight' is \(4, 6\) in the file and \(6, 6\) in the model"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_model_names_the_first_difference(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    run(path, steps=5)
    with pytest.raises(CheckpointError, match=said):
        run(path, vae(**settings))


def test_a_name_that_only_the_file_has_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"'more' is \(2,\) in the file and absent in the model"):
        load_weights(nn.Identity(), {"more": torch.zeros(2)}, "file")


# --- the file ------------------------------------------------------------------------------------------


def example(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        "a.weight": torch.randn(3, 2), "b": torch.tensor(5), "c": torch.zeros(0, 2), "d": torch.tensor([True, False]),
        "e": torch.randn(4, dtype=torch.bfloat16), "f": torch.randn(2, 3, dtype=torch.float64).T,
    }  # fmt: skip
    info = {"step": 12, "note": "größe", "rows": [{"loss": 0.1}]}
    save_checkpoint(path, tensors, info)
    return tensors, info


def test_what_is_saved_is_read_with_dtype_and_shape(tmp_path: Path) -> None:
    tensors, info = example(tmp_path / "deep" / "er" / "c.safetensors")
    got, got_info = read_checkpoint(tmp_path / "deep" / "er" / "c.safetensors")
    assert got_info == info
    assert got.keys() == tensors.keys()
    for name, value in tensors.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"a": torch.ones(10_000)}, {})
    tensors, _ = read_checkpoint(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(tensors["a"], torch.ones(10_000))


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    example(path)
    good = path.read_bytes()
    silent = []
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        try:
            read_checkpoint(path)
        except CheckpointError:
            continue
        silent.append(at)
    assert silent == []


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_a_truncated_file_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    example(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_checkpoint(path)


def test_a_file_with_something_appended_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    example(path)
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello", "truncated or damaged"),
        (b"<!DOCTYPE html><html>not found</html>" * 20, "truncated or damaged"),
        (b"PK\x03\x04" + bytes(200), "truncated or damaged"),
    ],
    ids=["text", "html", "pickle"],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        run(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="but not one that nblib wrote"):
        read_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path, {"nblib": "{}"})
    with pytest.raises(CheckpointError, match="was altered"):
        read_checkpoint(path)


def test_a_missing_file_and_a_folder_are_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="There is no checkpoint at"):
            read_checkpoint(path)


def test_tied_weights_can_be_saved_and_restored(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(16, 16, bias=False)
            self.two = nn.Linear(16, 16, bias=False)
            self.two.weight = self.one.weight

        def forward(self, batch: Tensor, **_: Any) -> LossOut:
            flat = batch.flatten(1)
            return LossOut((self.two(self.one(flat)) - flat).square().mean(), {})

    torch.manual_seed(0)
    first, second, third = Tied(), Tied(), Tied()
    third.load_state_dict(first.state_dict())
    run(tmp_path / "c", first, steps=10)
    run(tmp_path / "c", second)
    run(None, third)
    assert second.one.weight is second.two.weight
    assert torch.equal(second.one.weight, third.one.weight)


# --- what goes wrong while saving ----------------------------------------------------------------------


FULL_DISK = """
import os, resource, signal, sys
import torch
import nblib as nb
from nblib.errors import CheckpointError
from nblib.vae import VAE

path = sys.argv[1]
torch.set_num_threads(1)
torch.manual_seed(0)
settings = dict(batch_size=5, checkpoint=path, checkpoint_every=5, progress=False)
data = torch.rand(20, 1, 4, 4)
nb.fit(VAE((1, 4, 4), 2, hidden=(64,)), data, steps=5, **settings)
before = open(path, "rb").read()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
try:
    nb.fit(VAE((1, 4, 4), 2, hidden=(64,)), data, steps=20, **settings)
except CheckpointError as error:
    print(error)
else:
    sys.exit("no error")
assert open(path, "rb").read() == before, "the old checkpoint was changed"
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)], os.listdir(os.path.dirname(path))
try:
    nb.fit(VAE((1, 4, 4), 2, hidden=(64,)), data, steps=5, **{**settings, "checkpoint": path + "2"})
except CheckpointError as error:
    print(error)
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)], os.listdir(os.path.dirname(path))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(nb.fit(VAE((1, 4, 4), 2, hidden=(64,)), data, steps=20, **settings).step)
"""


def test_a_full_disk_keeps_the_checkpoint_of_before_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second, step = done.stdout.splitlines()
    assert f"Could not save {path}" in first
    assert "File too large; the checkpoint that was there before is intact" in first
    assert "run the same call again to go on" in first
    assert "nothing was written" in second
    assert step == "20"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "c.safetensors"
    with pytest.raises(CheckpointError, match=r"Could not save .*nothing was written"):
        run(path, steps=5)


class PoisonAt:
    """A transform that spoils one batch, and notes the checkpoint that stood there just before."""

    def __init__(self, step: int, value: float, path: Path) -> None:
        self.step, self.value, self.path, self.seen, self.before = step, value, path, 0, b""

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        self.seen += 1
        if self.seen != self.step:
            return batch
        self.before = self.path.read_bytes()
        return torch.full_like(batch, self.value)


class Plain(nn.Module):
    """Nothing that checks its input; the loss is finite at zero, but its gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: Tensor, **_: Any) -> LossOut:
        return LossOut((self.weight * batch.mean()).abs().sqrt(), {})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [6, 8, 10])
def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(step: int, value: float, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    poison = PoisonAt(step, value, path)
    with pytest.raises(NonFiniteLoss, match=rf"became {value} at step {step} .*the last good checkpoint is {path}"):
        run(path, Plain(), transform=poison, log_every=100)
    assert path.read_bytes() == poison.before
    assert read_checkpoint(path)[1]["history"]["step"] == 5


def test_a_gradient_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """At the last step before a checkpoint the loss is still finite, the weights are not."""
    path = tmp_path / "c.safetensors"
    poison = PoisonAt(10, 0.0, path)
    with pytest.raises(NonFiniteLoss, match=rf"'weight' became NaN or infinite by step 10 .*checkpoint is {path}"):
        run(path, Plain(), transform=poison)
    assert path.read_bytes() == poison.before
    tensors, _ = read_checkpoint(path)
    assert all(bool(value.isfinite().all()) for value in tensors.values())


def test_after_a_bad_batch_the_same_call_goes_on_from_the_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(NonFiniteLoss):
        run(path, Plain(), transform=PoisonAt(8, math.nan, path))
    assert_same(run(path, Plain()), run(tmp_path / "whole.safetensors", Plain()))
