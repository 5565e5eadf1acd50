"""``fit``: the training loop, native and readable."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nblib.data.sets import Split
from nblib.errors import CheckpointError, DataError, NonFiniteLoss, unknown
from nblib.train.checkpoint import load_weights, read_checkpoint, save_checkpoint
from nblib.train.history import History

__all__ = ["fit"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd, fused=True),
    "adam": lambda p, lr, wd: torch.optim.Adam(p, lr=lr, weight_decay=wd, fused=True),
    "adagrad": lambda p, lr, wd: torch.optim.Adagrad(p, lr=lr, weight_decay=wd),
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd),
}
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("float32", "bf16")
Transform = Callable[[Tensor, torch.Generator], Tensor]


def fit(
    model: nn.Module,
    data: Split | Tensor | np.ndarray,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup: int = 0,
    clip: float | None = None,
    ema: float | None = None,
    precision: str = "float32",
    compile: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    transform: Transform | None = None,
    eval_data: Split | Tensor | np.ndarray | None = None,
    eval_every: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    log_every: int | None = None,
    progress: bool | None = None,
    callback: Callable[[int, nn.Module], None] | None = None,
) -> History:
    """Train ``model`` in place on data that stay on the device.

    Batches, noise, learning rate and logs are functions of ``(seed, step)`` alone, so a run that was killed and is
    called again with the same ``checkpoint`` ends with the same bits as one that was not.

    Args:
        model: its ``forward(batch, generator=...)`` returns ``LossOut``, the mean loss over the batch.
        data: a ``Split``, or a tensor or array ``(N, ...)``. Integer images are kept as they are and scaled to
            [0, 1] batch by batch; every example is seen equally often, in an order drawn anew each epoch.
        steps, epochs: how long; give one of them.
        lr, optimizer, weight_decay: ``optimizer`` is one of adamw, adam, adagrad, sgd.
        schedule: ``"constant"`` or ``"cosine"`` (to zero); warmup: steps of linear warm-up of the learning rate.
        clip: largest global gradient norm. ema: decay of a moving average of the weights
            (``history.ema``), at most ``(1 + t) / (10 + t)`` at update t: a short run does not average its start.
        precision: ``"float32"`` or ``"bf16"`` (autocast). compile: ``torch.compile`` the model in place.
        device: where to train; a GPU where there is one.
        transform: ``(batch, generator) -> batch`` instead of the scaling (dequantization, binarization).
        eval_data: evaluated every ``eval_every`` steps (each epoch by default), in eval mode, with fixed noise.
        checkpoint: a file to save to every ``checkpoint_every`` steps and at the end, and to go on from if it exists.
        log_every: steps per row of the history. progress: show a bar; by default in notebooks and
            terminals, unless ``NBLIB_PROGRESS=0``.
        callback: called as ``callback(step, model)`` after each evaluation.

    Returns:
        A ``History``; ``history.model`` is ``model``.

    Raises:
        DataError: unusable data or settings. CheckpointError: the checkpoint does not fit or cannot be saved.
        NonFiniteLoss: the loss became NaN or infinite; the message names the step and the last good checkpoint.
    """
    device = _device(device)
    x, scale = _tensor(data, "data")
    n, batch_size = len(x), int(batch_size)
    if not 1 <= batch_size <= n:
        raise DataError(f"batch_size must lie between 1 and the number of examples, {n:,}; got {batch_size:,}.")
    if (steps is None) == (epochs is None):
        raise DataError(f"Give either steps or epochs, got steps={steps} and epochs={epochs}.")
    if epochs is not None and not 0 < epochs < math.inf:
        raise DataError(f"epochs must be a positive number, got {epochs}.")
    steps = math.ceil(epochs * n / batch_size) if steps is None else int(steps)  # type: ignore[operator]
    for what, value, known in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("schedule", schedule, SCHEDULES),
        ("precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise DataError(unknown(what, value, known))
    for need, holds in {
        f"steps >= 1, got {steps}": steps >= 1,
        f"a finite lr > 0, got {lr}": 0 < lr < math.inf,
        f"weight_decay >= 0, got {weight_decay}": weight_decay >= 0,
        f"warmup >= 0, got {warmup}": warmup >= 0,
        f"clip > 0, got {clip}": clip is None or clip > 0,
        f"0 <= ema < 1, got {ema}": ema is None or 0 <= ema < 1,
        f"checkpoint_every >= 1, got {checkpoint_every}": checkpoint_every is None or checkpoint_every >= 1,
    }.items():
        if not holds:
            raise DataError(f"fit needs {need}.")
    log_every = log_every or max(1, min(50, steps // 50))
    eval_every = eval_every or max(1, round(n / batch_size))

    model.to(device)
    prepare = _Prepare(scale, transform, next(model.parameters()).dtype)
    _validate(model, x, prepare, batch_size)
    x = x.to(device)
    held_out = None
    if eval_data is not None:
        held_out, eval_scale = _tensor(eval_data, "eval_data")
        if eval_scale != scale:
            raise DataError(f"eval_data is scaled by {eval_scale}, data by {scale}: give both in the same form.")
        _validate(model, held_out, prepare, batch_size)
        held_out = held_out.to(device)

    optim = OPTIMIZERS[optimizer](model.parameters(), lr, weight_decay)
    average = AveragedModel(model, multi_avg_fn=_moving_average(ema)) if ema is not None else None
    history = History(model=model, ema=average.module if average is not None else None)
    settings = dict(batch_size=batch_size, lr=lr, optimizer=optimizer, weight_decay=weight_decay, schedule=schedule,
                    warmup=warmup, clip=clip, ema=ema, precision=precision, seed=seed, examples=n)  # fmt: skip
    if schedule != "constant":
        settings["steps"] = steps
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        _restore(path, model, optim, average, history, settings)
    if compile and not getattr(model, "_compiled_call_impl", None):
        model.compile()

    order = _Order(n, seed)
    noise = torch.Generator(device)
    pending: list[tuple[Tensor, dict[str, Tensor]]] = []
    started, before = time.perf_counter(), history.seconds

    def flush() -> None:
        if pending:
            history.rows.append(_mean_row(pending, history.step, path))
            pending.clear()

    def save() -> None:
        if path is not None:
            history.seconds = before + time.perf_counter() - started
            _save(path, model, optim, average, history, settings)

    was_training = model.training
    model.train()
    with _own_randomness(device) as default, _bar(steps, history.step, progress) as bar:
        while history.step < steps:
            step = history.step
            noise.manual_seed(_mix(seed, step))
            default.manual_seed(_mix(seed, step))
            for group in optim.param_groups:
                group["lr"] = lr * _factor(step, steps, schedule, warmup)
            index = order.batch(step * batch_size, batch_size).to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss, logs = model(prepare(x.index_select(0, index), noise), generator=noise)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optim.step()
            optim.zero_grad(set_to_none=True)
            if average is not None:
                average.update_parameters(model)
            pending.append((loss.detach(), logs))
            history.step, history.examples = step + 1, (step + 1) * batch_size
            bar.update()
            done = history.step == steps
            at_eval = held_out is not None and (done or history.step % eval_every == 0)
            at_save = done or (checkpoint_every is not None and history.step % checkpoint_every == 0)
            if at_eval or at_save or history.step % log_every == 0:
                flush()
                bar.set_postfix(loss=f"{history.rows[-1]['loss']:.4g}", refresh=False)
            if at_eval and held_out is not None:
                judged = average.module if average is not None else model
                history.evals.append(_evaluate(judged, held_out, prepare, batch_size, seed, history.step))
                if callback is not None:
                    callback(history.step, model)
            if at_save:
                _check_weights(model, history.step, path)
                save()
    history.seconds = before + time.perf_counter() - started
    model.train(was_training)
    return history


# --- data ------------------------------------------------------------------------------------------------


def _device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else a GPU where there is one; one that cannot be used is refused at once."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device={str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return found


def _tensor(data: Split | Tensor | np.ndarray, name: str) -> tuple[Tensor, int | None]:
    """The examples, and the number by which integers are divided (None for floating-point data)."""
    if isinstance(data, Split):
        return data.x, data.levels - 1
    if isinstance(data, np.ndarray):
        # A read-only array or one with negative strides is copied: torch can hold neither.
        data = torch.from_numpy(np.require(data, requirements=("C", "W")))
    if not isinstance(data, Tensor):
        raise DataError(f"{name} must be a Split, a tensor or an array, got {type(data).__name__}.")
    if data.ndim < 1 or not len(data):
        raise DataError(f"{name} is empty: its shape is {tuple(data.shape)}.")
    if data.is_floating_point():
        if not bool(data.isfinite().all()):
            bad = int((~data.isfinite()).flatten(1).any(1).sum()) if data.ndim > 1 else int((~data.isfinite()).sum())
            raise DataError(f"{name} holds NaN or infinite values in {bad:,} of {len(data):,} examples.")
        return data, None
    if data.dtype != torch.uint8:
        raise DataError(f"{name} must be floating-point or uint8 (0..255), got {data.dtype}.")
    return data, 255


class _Prepare:
    """From stored examples to what the model sees."""

    def __init__(self, scale: int | None, transform: Transform | None, dtype: torch.dtype) -> None:
        self.scale, self.transform, self.dtype = scale, transform, dtype

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        if self.transform is not None:
            return self.transform(batch, generator)
        batch = batch.to(self.dtype)
        return batch if self.scale is None else batch.mul_(1 / self.scale)


def _validate(model: nn.Module, x: Tensor, prepare: _Prepare, batch_size: int) -> None:
    """Let the model look at the data once, before the first step: all of it, unless scaling fixes its range."""
    check = getattr(model, "check", None)
    if check is None:
        return
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    last = batch_size if prepare.scale is not None and prepare.transform is None else len(x)
    for start in range(0, last, 4096):
        check(prepare(x[start : min(start + 4096, last)].clone().to(device), generator))


class _Order:
    """The order of the examples: one permutation per epoch, drawn from (seed, epoch); batches run across epochs."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self.cached: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self.cached:
            generator = torch.Generator().manual_seed(_mix(self.seed + 1, epoch))
            self.cached = {e: p for e, p in self.cached.items() if e == epoch - 1}
            self.cached[epoch] = torch.randperm(self.n, generator=generator)
        return self.cached[epoch]

    def batch(self, start: int, size: int) -> Tensor:
        epoch, offset = divmod(start, self.n)
        first = self._epoch(epoch)[offset : offset + size]
        if len(first) == size:
            return first
        return torch.cat([first, self._epoch(epoch + 1)[: size - len(first)]])


# --- randomness, learning rate, logs ---------------------------------------------------------------------


def _mix(seed: int, counter: int) -> int:
    """One well-spread 63-bit seed per (seed, counter), by two rounds of splitmix64."""
    value = seed & (2**64 - 1)
    for word in (counter, 0x9E3779B97F4A7C15):
        value = (value + word * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[torch.Generator]:
    """The default generator, for layers such as dropout that know no other; its state is put back afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        index = device.index if device.index is not None else torch.cuda.current_device() if cuda else 0
        yield torch.cuda.default_generators[index] if cuda else torch.default_generator


def _moving_average(decay: float) -> Callable[[Any, Any, Tensor | int], None]:
    """``average += (1 - d) (value - average)`` with ``d = min(decay, (1 + t) / (10 + t))`` at update t."""

    def update(averages: Any, values: Any, count: Tensor | int) -> None:
        t = int(count)
        torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + t) / (10 + t)))

    return torch.no_grad()(update)


def _factor(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The learning rate at ``step`` relative to ``lr``: linear warm-up, then constant or half a cosine."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if schedule == "constant" or step < warmup:
        return rise
    return rise * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _mean_row(pending: list[tuple[Tensor, dict[str, Tensor]]], step: int, path: Path | None) -> dict[str, float]:
    losses = torch.stack([loss for loss, _ in pending]).double()
    finite = losses.isfinite()
    if not bool(finite.all()):
        first = step - len(pending) + int((~finite).int().argmax()) + 1
        value = float(losses[first - 1 - step + len(pending)])
        raise NonFiniteLoss(f"The loss became {value} at step {first} (phase 'main'); {_remedy(path)}")
    row = {"step": float(step), "loss": float(losses.mean())}
    for name in pending[0][1]:
        row[name] = float(torch.stack([logs[name] for _, logs in pending]).double().mean())
    return row


def _check_weights(model: nn.Module, step: int, path: Path | None) -> None:
    """A finite loss can have an infinite gradient: do not keep the weights that it leaves behind."""
    for name, value in model.named_parameters():
        if not bool(value.isfinite().all()):
            raise NonFiniteLoss(
                f"The weights {name!r} became NaN or infinite by step {step} (phase 'main'), before the loss did;"
                f" {_remedy(path)}"
            )


def _remedy(path: Path | None) -> str:
    kept = f"the last good checkpoint is {path}" if path is not None and path.exists() else "no checkpoint was kept"
    return f"{kept}. Lower the learning rate, clip the gradient (clip=1.0), or check the data for outliers."


@torch.no_grad()
def _evaluate(
    model: nn.Module, x: Tensor, prepare: _Prepare, batch_size: int, seed: int, step: int
) -> dict[str, float]:
    """Loss and logs averaged over all of ``x``, in eval mode, with the same noise at every call."""
    was_training = model.training
    model.eval()
    generator = torch.Generator(x.device).manual_seed(_mix(seed + 2, 0))
    size = max(batch_size, min(1000, len(x)))
    sums: dict[str, Tensor] = {}
    for start in range(0, len(x), size):
        part = x[start : start + size].clone()  # the transform may work in place
        loss, logs = model(prepare(part, generator), generator=generator)
        for name, value in {"loss": loss, **logs}.items():
            sums[name] = sums.get(name, 0.0) + value.double() * len(part)
    model.train(was_training)
    return {"step": float(step), **{name: float(value) / len(x) for name, value in sums.items()}}


def _bar(steps: int, done: int, progress: bool | None) -> Any:
    from tqdm.auto import tqdm

    if progress is None:
        watched = "ipykernel" in sys.modules or sys.stderr.isatty()
        progress = watched and os.environ.get("NBLIB_PROGRESS", "1") != "0"
    return tqdm(total=steps, initial=done, unit="step", disable=not progress, leave=False, file=sys.stderr)


# --- checkpoints -----------------------------------------------------------------------------------------


def _save(
    path: Path,
    model: nn.Module,
    optim: torch.optim.Optimizer,
    average: AveragedModel | None,
    history: History,
    settings: dict[str, Any],
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if average is not None:
        tensors |= {f"ema.{name}": value for name, value in average.state_dict().items()}
    for index, state in optim.state_dict()["state"].items():
        tensors |= {f"optim.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    # Two names of one storage (tied weights) cannot stand in one safetensors file.
    tensors = {name: value.clone() for name, value in tensors.items()}
    save_checkpoint(path, tensors, {"settings": settings, "history": history.to_json()})


def _restore(
    path: Path,
    model: nn.Module,
    optim: torch.optim.Optimizer,
    average: AveragedModel | None,
    history: History,
    settings: dict[str, Any],
) -> None:
    tensors, info = read_checkpoint(path)
    for name, value in settings.items():
        if (there := info.get("settings", {}).get(name)) != value:
            raise CheckpointError(
                f"{path} belongs to a run with {name}={there}, this one has {name}={value}: use the same settings to"
                " go on, or another file to start anew."
            )
    part = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
    load_weights(model, part("model."), path)
    if average is not None:
        load_weights(average, part("ema."), path)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optim.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optim.load_state_dict({"state": state, "param_groups": optim.state_dict()["param_groups"]})
    for name, value in info["history"].items():
        setattr(history, name, value)
