"""The training loop: order, randomness, averages, learning rates, inputs and refusals."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nblib as nb
from nblib.data import Split
from nblib.errors import CheckFailed, DataError, NonFiniteLoss
from nblib.train import History, LossOut
from nblib.vae import VAE

SHAPE = (1, 4, 4)
IMAGES = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(7))


def vae(seed: int = 0, **settings: Any) -> VAE:
    torch.manual_seed(seed)
    return VAE(SHAPE, 2, hidden=(8,), **settings)


def run(model: nn.Module | None = None, data: Any = IMAGES, **settings: Any) -> History:
    return nb.fit(model or vae(), data, **{"steps": 6, "batch_size": 8, **settings})


def weights(history: History) -> dict[str, Tensor]:
    assert history.model is not None
    return {name: value.clone() for name, value in history.model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Slope(nn.Module):
    """A loss whose gradient in the only weight is ``slope`` at every step."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.slope = slope

    def forward(self, batch: Tensor, *, phase: str = "main", generator: torch.Generator | None = None) -> LossOut:
        loss = self.slope * self.weight.sum() + 0 * batch.sum()
        return LossOut(loss, {"weight": self.weight[0].detach().clone()})


class Mean(nn.Module):
    """A loss that is the mean of what it is given, noise included, and does not learn."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.dropout, self.noise = nn.Dropout(0.5), noise
        self.seen: list[Tensor] = []

    def forward(self, batch: Tensor, *, phase: str = "main", generator: torch.Generator | None = None) -> LossOut:
        self.seen.append(batch.detach().clone())
        noise = self.noise * torch.randn(batch.shape, dtype=batch.dtype, generator=generator)
        value = (self.dropout(batch) + noise).mean()
        return LossOut(value + 0 * self.weight, {"twice": 2 * value.detach()})


def order(seed: int, n: int = 10, batch_size: int = 7, epochs: int = 7) -> Tensor:
    model = Mean()
    nb.fit(model, torch.arange(n, dtype=torch.float64), epochs=epochs, batch_size=batch_size, seed=seed)
    return torch.cat(model.seen).long()


# --- order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_every_example_is_seen_equally_often(batch_size: int) -> None:
    epochs = 3 * batch_size  # so that the steps fill whole epochs
    seen = order(0, batch_size=batch_size, epochs=epochs)
    assert seen.bincount(minlength=10).tolist() == [epochs] * 10


def test_every_epoch_is_a_permutation_of_its_own_also_where_batches_run_across() -> None:
    epochs = order(0).reshape(7, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 7


def test_the_order_is_a_function_of_the_seed_and_the_epoch() -> None:
    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))
    assert torch.equal(order(3), order(3, batch_size=5, epochs=7)[:70])


def test_epochs_become_steps() -> None:
    assert run(steps=None, epochs=2).step == math.ceil(2 * 20 / 8)
    assert run(steps=None, epochs=0.1).step == 1
    assert run(steps=5).examples == 40


# --- randomness ----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    assert same(weights(run(seed=3)), weights(run(seed=3)))
    assert not same(weights(run(seed=3)), weights(run(seed=4)))


def test_the_result_does_not_depend_on_the_global_random_state() -> None:
    class Dropping(VAE):
        def _encode(self, x: Tensor) -> Any:
            return super()._encode(nn.functional.dropout(x, 0.3, self.training))

    def once(state: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Dropping(SHAPE, 2, hidden=(8,))
        torch.manual_seed(state)
        return weights(run(model))

    assert same(once(1), once(2))


def test_logs_and_checkpoints_do_not_change_the_result(tmp_path: Path) -> None:
    plain = weights(run(steps=12))
    assert same(plain, weights(run(steps=12, log_every=1, eval_data=IMAGES, eval_every=5)))
    assert same(plain, weights(run(steps=12, checkpoint=tmp_path / "c.safetensors", checkpoint_every=5)))


def test_fit_leaves_the_global_random_states_alone() -> None:
    def states() -> tuple[Tensor, Any, Any]:
        return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]

    model = vae()
    before = states()
    run(model, eval_data=IMAGES, ema=0.9)
    after = states()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_fit_restores_the_mode_of_the_model_and_the_data() -> None:
    data = IMAGES.clone()
    model = vae().eval()
    run(model, data, eval_data=data)
    assert not model.training
    assert run(vae()).model.training  # type: ignore[union-attr]
    assert torch.equal(data, IMAGES)


def test_a_transform_that_works_in_place_does_not_spoil_the_data() -> None:
    data, held_out = IMAGES.clone(), IMAGES.clone()
    run(data=data, eval_data=held_out, transform=lambda batch, _: batch.mul_(0.5))
    assert torch.equal(data, IMAGES)
    assert torch.equal(held_out, IMAGES)


# --- averages, clipping, learning rates ----------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.1, 0.3, 0.999])
def test_the_moving_average_is_the_textbook_recursion_with_a_warm_start(decay: float) -> None:
    path: list[dict[str, Tensor]] = []

    def note(_: int, model: nn.Module) -> None:
        path.append({name: value.detach().clone() for name, value in model.named_parameters()})

    model = vae().double()
    history = run(model, IMAGES.double(), steps=7, ema=decay, eval_data=IMAGES.double(), eval_every=1, callback=note)
    assert len(path) == 7
    assert history.ema is not None
    for name, got in history.ema.named_parameters():
        expected = path[0][name]
        for t, now in enumerate(path[1:], start=1):
            d = min(decay, (1 + t) / (10 + t))
            expected = d * expected + (1 - d) * now[name]
        nb.check(name, got, expected, atol=1e-12)
        with pytest.raises(CheckFailed):
            nb.check(name, path[-1][name], expected, atol=1e-12)


def test_evaluation_judges_the_moving_average() -> None:
    history = run(steps=7, ema=0.9, eval_data=IMAGES, lr=0.05)
    judged = run(history.ema, steps=1, lr=1e-12, eval_data=IMAGES).last["loss"]
    plain = run(history.model, steps=1, lr=1e-12, eval_data=IMAGES).last["loss"]
    nb.check("average", history.last["loss"], judged, atol=1e-4)
    assert abs(plain - judged) > 1e-3


def test_without_ema_there_is_no_average() -> None:
    assert run().ema is None


@pytest.mark.parametrize(("slope", "clip"), [(10.0, 1.0), (-4.0, 0.5), (0.1, 1.0)])
def test_clipping_bounds_the_global_norm_of_the_gradient(slope: float, clip: float) -> None:
    model = Slope(slope)
    nb.fit(model, torch.zeros(4), steps=1, batch_size=2, lr=1.0, optimizer="sgd", clip=clip)
    norm = abs(slope) * math.sqrt(3)
    nb.check("norm", model.weight.norm(), min(norm, clip), atol=1e-5)
    nb.check("direction", model.weight / model.weight.norm(), [-math.copysign(1, slope) / math.sqrt(3)] * 3, atol=1e-6)


def rates(steps: int, **settings: Any) -> np.ndarray:
    """The learning rates that were used: plain gradient descent on a slope of one."""
    history = nb.fit(Slope(), torch.zeros(4), steps=steps, batch_size=2, optimizer="sgd", log_every=1, **settings)
    return -np.diff([*history["weight"], float(history.model.weight[0].detach())])  # type: ignore[union-attr, index]


def test_a_constant_learning_rate_is_constant() -> None:
    nb.check("constant", rates(5, lr=0.3), [0.3] * 5, atol=1e-9)


def test_the_warm_up_is_linear() -> None:
    nb.check("warm-up", rates(8, lr=0.4, warmup=4), [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4], atol=1e-9)


def test_the_cosine_falls_from_one_to_zero() -> None:
    t = np.arange(10) / 10
    nb.check("cosine", rates(10, lr=0.5, schedule="cosine"), 0.5 * np.cos(np.pi * t / 2) ** 2, atol=1e-9)
    with pytest.raises(CheckFailed):
        nb.check("cosine", rates(10, lr=0.5, schedule="cosine"), 0.5 * np.cos(np.pi * t / 2), atol=1e-9)


def test_the_cosine_begins_after_the_warm_up() -> None:
    t = np.arange(6) / 6
    expected = 0.5 * np.concatenate([[0.25, 0.5, 0.75, 1.0], np.cos(np.pi * t / 2) ** 2])
    nb.check("both", rates(10, lr=0.5, schedule="cosine", warmup=4), expected, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "adagrad", "sgd"])
def test_every_optimizer_takes_its_own_steps(optimizer: str) -> None:
    reference = Slope(0.3)
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD,
    }  # fmt: skip
    with torch.no_grad():
        reference.weight += 1
    model = Slope(0.3)
    model.load_state_dict(reference.state_dict())
    optim = classes[optimizer](reference.parameters(), lr=0.1, weight_decay=0.2)
    for _ in range(3):
        reference(torch.zeros(2)).loss.backward()
        optim.step()
        optim.zero_grad()
    nb.fit(model, torch.zeros(4), steps=3, batch_size=2, lr=0.1, optimizer=optimizer, weight_decay=0.2)
    nb.check(optimizer, model.weight, reference.weight, atol=1e-9)


def test_training_lowers_the_loss() -> None:
    one = (IMAGES[:1] > 0.5).float().repeat(20, 1, 1, 1)
    history = run(data=one, steps=100, lr=0.03)
    assert history["loss"][-1] < history["loss"][0] / 4


# --- precision and compilation -------------------------------------------------------------------------


def test_bf16_trains_close_to_float32_with_float32_weights() -> None:
    full, half = run(vae(), steps=20, lr=1e-2), run(vae(), steps=20, lr=1e-2, precision="bf16")
    assert all(p.dtype == torch.float32 for p in half.model.parameters())  # type: ignore[union-attr]
    nb.check("loss", half["loss"], full["loss"], rtol=0.02)
    assert not same(weights(full), weights(half))


def test_a_float64_model_sees_float64() -> None:
    model = vae().double()
    history = run(model, IMAGES)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert np.isfinite(history["loss"]).all()
    mean = Mean()
    run(mean, (IMAGES * 255).to(torch.uint8))
    assert mean.seen[0].dtype == torch.float64


class Line(nn.Module):
    """The smallest model that is worth compiling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(5, 5)

    def forward(self, batch: Tensor, *, phase: str = "main", generator: torch.Generator | None = None) -> LossOut:
        loss = (self.layer(batch).tanh() - batch).square().mean()
        return LossOut(loss, {"root": loss.detach().sqrt()})


def check_compiled(make: Callable[[], nn.Module], data: Tensor) -> None:
    torch._dynamo.reset()
    plain, fast = (run(make(), data, steps=4, lr=0.01, log_every=1, ema=0.5, compile=c) for c in (False, True))
    assert getattr(fast.model, "_compiled_call_impl", None) is not None
    one, two = weights(plain), weights(fast)
    assert list(one) == list(two)
    for name, value in one.items():
        nb.check(name, two[name], value, atol=1e-4)
    nb.check("loss", fast["loss"], plain["loss"], atol=1e-4)


@pytest.mark.filterwarnings("default")  # torch warns itself while it compiles
def test_a_compiled_model_gives_the_same_numbers_under_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    check_compiled(Line, torch.rand(20, 5))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_compiled_vae_gives_the_same_numbers_under_the_same_names(
    warmup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured and differentiated by the compiler, but without its C++, which takes long."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_(module, backend="aot_eager"))
    check_compiled(lambda: vae(beta_warmup=warmup), IMAGES)


# --- data ----------------------------------------------------------------------------------------------


def test_a_tensor_an_array_bytes_and_a_split_give_the_same_run() -> None:
    bytes_ = (IMAGES * 255).round().to(torch.uint8)
    split = Split("x", "train", bytes_, torch.zeros(20), (), 256, 20, "here")
    reference = run(data=bytes_.float() / 255)["loss"]
    for data in (bytes_, bytes_.numpy(), split, (bytes_.float() / 255).numpy()):
        nb.check("loss", run(data=data)["loss"], reference, atol=1e-4)
    with pytest.raises(CheckFailed):
        nb.check("loss", run(data=bytes_.float() / 256)["loss"], reference, atol=1e-4)


def test_a_split_is_scaled_by_its_own_levels() -> None:
    model = Mean()
    x = torch.arange(17, dtype=torch.uint8).reshape(17, 1, 1, 1)
    run(model, Split("x", "train", x, torch.zeros(17), (), 17, 17, "here"), batch_size=17, steps=1)
    nb.check("scale", model.seen[0].flatten().sort().values, torch.arange(17) / 16, atol=1e-7)


def test_arrays_that_torch_cannot_hold_are_copied() -> None:
    frozen = IMAGES.numpy().copy()
    frozen.flags.writeable = False
    nb.check("read-only", run(data=frozen)["loss"], run()["loss"])
    nb.check("reversed", run(data=IMAGES.numpy()[::-1])["loss"], run(data=IMAGES.flip(0))["loss"])


def test_the_transform_takes_the_place_of_the_scaling() -> None:
    taken, model = [], Mean()

    def transform(batch: Tensor, generator: torch.Generator) -> Tensor:
        taken.append(batch.clone())
        return (batch + torch.rand(batch.shape, generator=generator)).double()

    data = (IMAGES * 255).to(torch.uint8)
    run(model, data, transform=transform, seed=1)
    assert all(batch.dtype == torch.uint8 for batch in taken)
    assert float(model.seen[0].max()) > 1
    again = Mean()
    run(again, data, transform=transform, seed=1)
    assert torch.equal(torch.cat(model.seen), torch.cat(again.seen))
    other = Mean()
    run(other, data, transform=transform, seed=2)
    assert not torch.equal(torch.cat(model.seen), torch.cat(other.seen))


def test_transformed_data_are_checked_in_full_before_the_first_step() -> None:
    data = torch.full((50, *SHAPE), 0.5)
    data[49] = 3
    model = vae()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=r"got values from 0\.5 to 3"):
        run(model, data, transform=lambda batch, _: batch)
    assert same(before, model.state_dict())


# --- evaluation and history ----------------------------------------------------------------------------


def test_evaluation_weighs_every_example_equally_in_eval_mode() -> None:
    x = torch.rand(1003, 1, dtype=torch.float64)
    history = run(Mean(), x[:20], eval_data=x, eval_every=4)
    assert [row["step"] for row in history.evals] == [4, 6]
    nb.check("mean", history["eval/loss"], [float(x.mean())] * 2, atol=1e-12)
    nb.check("logs", history["eval/twice"], [2 * float(x.mean())] * 2, atol=1e-12)


def test_evaluation_draws_the_same_noise_every_time() -> None:
    history = run(Mean(noise=1.0), IMAGES.double(), eval_data=IMAGES.double(), eval_every=2)
    assert len(set(history["eval/loss"].tolist())) == 1
    assert len(set(history["loss"].tolist())) == 6


def test_evaluation_happens_every_epoch_by_default() -> None:
    history = run(steps=12, batch_size=5, eval_data=IMAGES)
    assert history.steps("eval/loss").tolist() == [4, 8, 12]


def test_the_callback_is_called_after_each_evaluation() -> None:
    called: list[int] = []
    model = vae()

    def callback(step: int, given: nn.Module) -> None:
        assert given is model
        called.append(step)

    run(model, eval_data=IMAGES, eval_every=4, callback=callback)
    assert called == [4, 6]


def test_a_row_is_the_mean_since_the_row_before() -> None:
    fine, coarse = run(log_every=1), run(log_every=3)
    assert coarse.steps().tolist() == [3, 6]
    for name in ("loss", "reconstruction", "kl"):
        nb.check(name, coarse[name], fine[name].reshape(2, 3).mean(1), atol=1e-6)


def test_the_history_knows_its_columns() -> None:
    history = run(eval_data=IMAGES, log_every=2)
    own = ["step", "loss", "reconstruction", "kl"]
    assert history.names() == [*own, *(f"eval/{name}" for name in own)]
    assert history["eval/kl"].shape == history.steps("eval/kl").shape
    assert history.last is history.evals[-1]
    assert run().last["step"] == 6
    assert history.seconds > 0
    assert set(history.to_json()) == {"rows", "evals", "seconds", "step", "examples"}
    assert repr(history).startswith("History(6 steps, ")


@pytest.mark.parametrize(("wrong", "near"), [("los", "loss"), ("eval/recon", "eval/reconstruction")])
def test_an_unknown_column_names_the_nearest(wrong: str, near: str) -> None:
    history = run(eval_data=IMAGES)
    with pytest.raises(DataError, match=rf"column '{wrong}'. Did you mean '{near}'\?"):
        history[wrong]


def test_a_column_of_what_was_not_evaluated_is_unknown() -> None:
    with pytest.raises(DataError, match="'eval/loss'"):
        run().steps("eval/loss")


def test_the_history_draws_every_column_or_those_asked_for() -> None:
    import matplotlib.pyplot as plt

    history = run(eval_data=IMAGES)
    _, axes = plt.subplots(1, 2)
    history.plot(ax=axes[0])
    assert {line.get_label() for line in axes[0].lines} == {n for n in history.names() if not n.endswith("step")}
    history.plot("eval/kl", ax=axes[1])
    assert axes[1].lines[0].get_ydata().tolist() == history["eval/kl"].tolist()
    assert axes[1].lines[0].get_xdata().tolist() == history.steps("eval/kl").tolist()


def test_the_bar_is_for_those_who_watch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(**settings: Any) -> bool:
        run(**settings)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("step" in err) == bool(err)
        return bool(err)

    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.delenv("NBLIB_PROGRESS")
    assert not drawn()
    assert drawn(progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert drawn()
    assert not drawn(progress=False)
    monkeypatch.setenv("NBLIB_PROGRESS", "0")
    assert not drawn()
    assert drawn(progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    monkeypatch.setenv("NBLIB_PROGRESS", "1")
    assert not drawn()
    monkeypatch.setitem(sys.modules, "ipykernel", nb)
    assert drawn()


# --- refusals ------------------------------------------------------------------------------------------


HOLED = IMAGES.clone()
HOLED[3, 0, 0, 0] = math.nan
HOLED[9, 0, 1, 1] = math.inf


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 21}, "number of examples, 20; got 21"),
        ({"batch_size": 0}, "got 0"),
        ({"data": IMAGES[:0]}, r"data is empty: its shape is \(0, 1, 4, 4\)"),
        ({"data": torch.tensor(1.0)}, r"data is empty: its shape is \(\)"),
        ({"data": HOLED}, "NaN or infinite values in 2 of 20 examples"),
        ({"data": HOLED.flatten(), "batch_size": 4}, "NaN or infinite values in 2 of 320 examples"),
        ({"data": [1.0, 2.0]}, "a Split, a tensor or an array, got list"),
        ({"data": IMAGES.long()}, r"floating-point or uint8 \(0\.\.255\), got torch\.int64"),
        ({"data": IMAGES * 255}, r"got values from .* to 2\d\d"),
        ({"data": IMAGES[:, :, :3]}, r"got \(8, 1, 3, 4\)|got \(20, 1, 3, 4\)"),
        ({"eval_data": IMAGES[:0]}, "eval_data is empty"),
        ({"eval_data": HOLED}, "eval_data holds NaN"),
        ({"eval_data": IMAGES * 255}, r"got values from .* to 2\d\d"),
        ({"eval_data": IMAGES[:, :, :3]}, r"got \(20, 1, 3, 4\)"),
        ({"eval_data": (IMAGES * 255).to(torch.uint8)}, "scaled by 255, data by None"),
        ({"steps": None}, "either steps or epochs, got steps=None and epochs=None"),
        ({"epochs": 2}, "either steps or epochs, got steps=6 and epochs=2"),
        ({"steps": 0}, "steps >= 1, got 0"),
        ({"steps": None, "epochs": 0}, "epochs must be a positive number, got 0"),
        ({"steps": None, "epochs": math.nan}, "got nan"),
        ({"steps": None, "epochs": math.inf}, "got inf"),
        ({"lr": 0.0}, r"lr > 0, got 0\.0"),
        ({"lr": math.nan}, "lr > 0, got nan"),
        ({"weight_decay": -0.1}, r"weight_decay >= 0, got -0\.1"),
        ({"warmup": -1}, "warmup >= 0, got -1"),
        ({"clip": 0.0}, r"clip > 0, got 0\.0"),
        ({"ema": 1.0}, r"0 <= ema < 1, got 1\.0"),
        ({"checkpoint_every": 0}, "checkpoint_every >= 1, got 0"),
        ({"optimizer": "adan"}, r"optimizer 'adan'. Did you mean 'adam'\?"),
        ({"schedule": "cosinus"}, r"schedule 'cosinus'. Did you mean 'cosine'\?"),
        ({"precision": "BF16"}, r"precision 'BF16'. Did you mean 'bf16'\?"),
        ({"device": "gpu"}, "device='gpu' cannot be used here"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used here"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_data_and_settings_are_refused_before_the_first_step(settings: dict[str, Any], said: str) -> None:
    model = vae()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=said):
        run(model, **settings)
    assert same(before, model.state_dict())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step() -> None:
    data = IMAGES.double()

    class Breaking(Mean):
        def forward(self, batch: Tensor, **rest: Any) -> LossOut:
            loss, logs = super().forward(batch, **rest)
            return LossOut(loss / (0.0 if len(self.seen) == 5 else 1.0), logs)

    with pytest.raises(NonFiniteLoss, match=r"became inf at step 5 .*no checkpoint was kept.*clip=1\.0"):
        run(Breaking(), data, steps=20, log_every=7)


def test_weights_that_are_not_finite_are_not_returned() -> None:
    class Root(Slope):
        def forward(self, batch: Tensor, **_: Any) -> LossOut:
            return LossOut(self.weight.abs().sum().sqrt() + 0 * batch.sum(), {})

    with pytest.raises(NonFiniteLoss, match=r"weights 'weight' became NaN or infinite by step 1"):
        nb.fit(Root(), torch.zeros(4), steps=1, batch_size=2)
