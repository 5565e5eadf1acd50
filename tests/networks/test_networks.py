"""The contract that every network of the time keeps, and what belongs to one of them only."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import nblib as nb
from nblib import networks
from nblib.errors import CheckpointError, DataError
from nblib.networks import TIME_EMBEDDINGS, DiT, FourierEmbedding, SinusoidalEmbedding, TimeMLP, UNet
from nblib.train import load_weights, read_checkpoint, save_checkpoint

Network = TimeMLP | UNet | DiT
KINDS: dict[str, tuple[Callable[..., Network], tuple[int, ...]]] = {
    "mlp": (lambda **more: TimeMLP(3, hidden=16, layers=2, features=16, **more), (3,)),
    "unet": (lambda **more: UNet(2, width=16, multipliers=(1, 2), attention=2, heads=2, **more), (2, 8, 8)),
    "dit": (lambda **more: DiT(2, patch=2, dim=16, depth=2, heads=2, **more), (2, 8, 8)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def small(kind: str, *, shake: float = 0.3, double: bool = False, **more: Any) -> Network:
    """A small network of the kind. Networks start at zero: every parameter is moved away, unless ``shake`` is 0."""
    network = KINDS[kind][0](**more)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return network.double() if double else network


def batch(kind: str, n: int = 3, **like: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *KINDS[kind][1], **like), torch.rand(n, **like)


def change(one: Tensor, other: Tensor) -> Tensor:
    """The largest change in each row."""
    return (one - other).detach().abs().flatten(1).amax(1)


def labels(*values: int) -> Tensor:
    return torch.tensor(values)


# --- shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [(28, 28), (32, 32), (8, 8), (4, 12), (5, 7), (1, 1), (30, 33)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_unet_keeps_the_shape_of_images_of_any_side(side: tuple[int, int], channels: int) -> None:
    network = UNet(channels, width=8)
    x = torch.randn(2, channels, *side)
    assert network(x, torch.rand(2)).shape == x.shape


@pytest.mark.parametrize(("side", "patch"), [((28, 28), 4), ((32, 32), 4), ((4, 12), 4), ((28, 32), 2), ((5, 3), 1)])
def test_dit_keeps_the_shape_of_images_that_the_patch_divides(side: tuple[int, int], patch: int) -> None:
    x = torch.randn(2, 3, *side)
    assert DiT(3, patch=patch, dim=16, depth=1)(x, torch.rand(2)).shape == x.shape


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_mlp_keeps_the_shape_of_vectors(dim: int) -> None:
    assert TimeMLP(dim, hidden=8)(torch.randn(4, dim), torch.rand(4)).shape == (4, dim)


@pytest.mark.parametrize(
    "options",
    [
        {"multipliers": (2,), "attention": 1},
        {"multipliers": (1, 1, 2, 3), "attention": 4},
        {"blocks": 2, "attention": 0, "heads": 3},
        {"blocks": 2, "attention": 3, "heads": 1, "multipliers": (3, 2, 1)},
    ],
    ids=str,
)
def test_unet_of_other_architectures(options: dict[str, Any]) -> None:
    network = UNet(1, width=16, **options)
    x = torch.randn(2, 1, 12, 12)
    assert network(x, torch.rand(2)).shape == x.shape
    found = sum(type(m).__name__ == "_ImageAttention" for m in network.modules())
    levels, at, blocks = len(options.get("multipliers", (1, 2, 4))), options["attention"], options.get("blocks", 1)
    assert found == ((1 + blocks) + 2 * blocks * (at - 1) if at else 0)
    assert sum(type(m).__name__ == "_TimeBlock" for m in network.modules()) == 1 + blocks + 2 * blocks * (levels - 1)


def test_unet_sees_a_padded_image_as_the_image_on_black() -> None:
    network, x, t = small("unet", double=True), torch.randn(2, 2, 7, 9, dtype=torch.float64), torch.rand(2)
    larger = torch.zeros(2, 2, 8, 10, dtype=torch.float64)
    larger[:, :, :7, :9] = x
    nb.check("cut", network(x, t), network(larger, t)[:, :, :7, :9], atol=1e-12)


# --- how they start and learn ----------------------------------------------------------------------------


@kinds
def test_the_output_starts_at_zero(kind: str) -> None:
    x, t = batch(kind)
    assert torch.equal(small(kind, shake=0, classes=4)(x, t, labels(0, 3, -1)), torch.zeros_like(x))
    assert bool((small(kind)(x, t).abs() > 1e-3).any())


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (networks._TimeBlock(8, 8, 4), (2, 8, 5, 3)),
        (networks._ImageAttention(8, 2), (2, 8, 5, 3)),
        (networks._DiTBlock(8, 2), (2, 15, 8)),
    ],
    ids=["time", "attention", "dit"],
)
def test_blocks_start_as_the_identity(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(module(x, torch.randn(2, 8 if len(shape) == 3 else 4)), x)


@kinds
def test_gradients_reach_every_parameter(kind: str) -> None:
    x, t = batch(kind)
    network = small(kind, classes=4, double=True)
    network(x.double(), t, labels(0, 3, -1)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 1e-9, name


@kinds
def test_four_steps_of_training_move_every_parameter(kind: str) -> None:
    """The layers that start at zero stop the gradient of those before them for a few steps, and not for longer."""
    x, t = batch(kind)
    network, target = small(kind, shake=0, classes=4), torch.randn_like(x)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (network(x, t, labels(0, 3, -1)) - target).square().mean().backward()
        optimizer.step()
    for name, value in network.named_parameters():
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("make", "shape", "steps"),
    [(TimeMLP, (2,), 30), (UNet, (1, 28, 28), 30), (DiT, (1, 28, 28), 30)],
    ids=["mlp", "unet", "dit"],
)
def test_the_default_network_learns_two_examples_by_heart(
    make: Callable[[], Network], shape: tuple[int, ...], steps: int
) -> None:
    network, x, t = make(), torch.randn(2, *shape), torch.tensor([0.3, 0.6])
    image = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    target = torch.stack([image, -image.flip(-1)])
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    losses = []
    for _ in range(steps):
        loss = (network(x, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 10, losses


@pytest.mark.parametrize("make", [TimeMLP, UNet, DiT])
def test_the_number_of_parameters_is_the_one_of_the_docstring(make: type[Network]) -> None:
    said = re.search(r"([\d,]+)\s+parameters", inspect.getdoc(make) or "")
    assert said
    assert sum(p.numel() for p in make().parameters()) == int(said[1].replace(",", ""))


# --- what the output depends on --------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("time", TIME_EMBEDDINGS)
def test_the_output_depends_on_the_time_and_on_the_label(kind: str, time: str) -> None:
    network = small(kind, classes=4, time=time)
    x, t = batch(kind)
    one = network(x, t, labels(1, 1, 1))
    assert bool((change(network(x, t + 0.05, labels(1, 1, 1)), one) > 1e-3).all())
    assert bool((change(network(x, t), one) > 1e-3).all())
    assert (change(network(x, t, labels(1, 2, 1)), one) > 1e-3).tolist() == [False, True, False]


@kinds
def test_the_label_minus_one_is_no_condition(kind: str) -> None:
    network = small(kind, classes=4)
    x, t = batch(kind)
    assert torch.equal(network(x, t, labels(-1, -1, -1)), network(x, t))
    mixed = network(x, t, labels(2, -1, 0))
    nb.check("row", mixed[1], network(x, t)[1], atol=1e-5)
    assert (change(mixed, network(x, t)) > 1e-3).tolist() == [True, False, True]


@kinds
@pytest.mark.parametrize("classes", [None, 4])
def test_a_row_depends_on_no_other_row(kind: str, classes: int | None) -> None:
    network = small(kind, classes=classes, double=True)
    x, t = batch(kind, 5, dtype=torch.float64)
    condition = labels(0, 1, -1, 3, 2) if classes else None
    whole = network(x, t, condition)
    for i in range(5):
        alone = network(x[i : i + 1], t[i : i + 1], None if condition is None else condition[i : i + 1])
        nb.check("alone", alone[0], whole[i], atol=1e-12, rtol=1e-10)
    others = x.clone()
    others[1:] = 100 * torch.randn_like(x[1:])
    assert torch.equal(network(others, t, condition)[0], whole[0])


@kinds
def test_a_time_may_be_one_number_for_all(kind: str) -> None:
    network = small(kind)
    x, _ = batch(kind)
    each = network(x, torch.full((3,), 0.25))
    assert torch.equal(network(x, 0.25), each)
    assert torch.equal(network(x, torch.tensor(0.25)), each)
    assert torch.equal(network(x, 1), network(x, torch.ones(3)))


@pytest.mark.parametrize("attention", [True, False])
def test_attention_of_the_unet_lets_far_pixels_meet(attention: bool) -> None:
    """Norms aside, which see the whole image: with them fixed, only attention reaches beyond the convolutions."""
    network = UNet(1, width=16, multipliers=(1, 1), attention=int(attention))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    x = torch.randn(1, 1, 64, 64, requires_grad=True)
    network(x, 0.5)[0, 0, 0, 0].backward()
    assert x.grad is not None
    assert bool(x.grad[0, 0, 1, 1] != 0)
    assert bool(x.grad[0, 0, 63, 63] != 0) == attention


@pytest.mark.parametrize("part", ["lower level", "way down"])
def test_the_way_up_of_the_unet_sees_the_lower_level_and_the_way_down(part: str) -> None:
    network, x = small("unet", double=True), torch.randn(1, 2, 8, 8, dtype=torch.float64)
    assert isinstance(network, UNet)
    first = network.up[0][0]  # its input: 32 channels of the lower level, then 16 of this one
    with torch.no_grad():
        before = network(x, 0.5)
        for weight in (first.conv1.weight, first.skip.weight):
            (weight[:, :32] if part == "lower level" else weight[:, 32:]).zero_()
        assert bool(((network(x, 0.5) - before).abs() > 1e-3).any())


def test_attention_is_that_of_pytorch() -> None:
    own, reference = networks._Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    own.qkv.weight, own.qkv.bias = reference.in_proj_weight, reference.in_proj_bias
    own.out.weight, own.out.bias = reference.out_proj.weight, reference.out_proj.bias
    x = torch.randn(2, 7, 12)
    nb.check("attention", own(x), reference(x, x, x)[0], atol=1e-6)


def test_without_attention_a_patch_of_dit_sees_itself_only() -> None:
    network, x = small("dit"), torch.randn(1, 2, 6, 10)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, networks._Attention):
                module.out.weight.zero_()
        other = x.clone()
        other[:, :, 2:4, 6:8] += 1
        moved = (network(other, 0.5) - network(x, 0.5)).abs().amax((0, 1)) > 1e-4
    expected = torch.zeros(6, 10, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal(moved, expected)


def test_dit_knows_where_a_patch_is() -> None:
    """Attention alone treats tokens as a set: with the positions, exchanging two patches is not exchanged back."""
    network = small("dit", double=True)
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    for axis in (2, 3):
        rolled = network(x.roll(2, axis), 0.5).roll(-2, axis)
        assert bool(change(rolled, network(x, 0.5)) > 1e-3)


# --- embeddings ------------------------------------------------------------------------------------------


def test_the_sinusoidal_embedding_is_its_formula() -> None:
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    k = range(4)
    expected = [
        [f(1000 * float(s) * 10_000 ** (-2 * i / 8)) for f in (math.sin, math.cos) for i in k] for s in t.tolist()
    ]
    nb.check("sinusoidal", SinusoidalEmbedding(8)(t), torch.tensor(expected, dtype=torch.float64), atol=1e-9)


def test_the_inner_product_of_fourier_embeddings_is_the_gaussian_kernel() -> None:
    embedding = FourierEmbedding(400_000, scale=0.7).double()
    a, b = torch.tensor([0.1, 0.5, 0.2]), torch.tensor([0.15, 0.2, 1.0])
    products = (embedding(a) * embedding(b)).sum(-1) / 200_000
    expected = torch.exp(-2 * (math.pi * 0.7 * (a - b)) ** 2)
    # The standard error of the mean of 200000 cosines is below 0.0023.
    nb.check("kernel", products, expected, atol=0.01)


@pytest.mark.parametrize("name", TIME_EMBEDDINGS)
def test_embeddings_tell_near_times_apart_and_have_length_one_per_pair(name: str) -> None:
    gamma = TIME_EMBEDDINGS[name](32)(torch.linspace(0, 1, 101))
    assert gamma.shape == (101, 32)
    nb.check("length", gamma.square().sum(-1), torch.full((101,), 16.0), atol=1e-4)
    distances = torch.cdist(gamma, gamma) + 9 * torch.eye(101)
    assert float(distances.min()) > 0.05


def test_times_keep_single_precision_in_a_network_of_half_precision() -> None:
    network = TimeMLP(2, hidden=8).bfloat16()
    seen: list[torch.dtype] = []
    network.embedding.time.register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    for t in (torch.rand(2), torch.rand(2, dtype=torch.float64), torch.rand(2).bfloat16(), 0.5):
        assert network(x, t).dtype == torch.bfloat16
    assert seen == [torch.float32, torch.float64, torch.float32, torch.float32]


# --- machinery -------------------------------------------------------------------------------------------


@kinds
def test_the_graph_is_whole(kind: str) -> None:
    network = small(kind, classes=4)
    x, t = batch(kind)
    condition = labels(0, -1, 3)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    nb.check("compiled", compiled(x, t, condition), network(x, t, condition), atol=1e-6)
    nb.check("a number and no label", compiled(x, 0.5), network(x, 0.5), atol=1e-6)


@kinds
def test_automatic_mixed_precision(kind: str) -> None:
    network = small(kind, shake=0.1, classes=4)
    x, t = batch(kind)
    exact = network(x, t, labels(0, 1, -1))
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, t, labels(0, 1, -1))
        rough.float().square().mean().backward()
    assert rough.dtype == torch.bfloat16
    assert bool((rough.float() - exact).norm() < 0.03 * exact.norm())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


@kinds
# PyTorch's own, when forward mode is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
def test_derivatives_of_every_kind_in_plain_attention(kind: str) -> None:
    network = small(kind, double=True)
    x, t = batch(kind, 2, dtype=torch.float64)
    v = torch.randn_like(x)

    def one(row: Tensor, time: Tensor) -> Tensor:
        return network(row.unsqueeze(0), time.unsqueeze(0))[0]

    with sdpa_kernel(SDPBackend.MATH):
        forward: Tensor = torch.func.jvp(lambda x: network(x, t), (x,), (v,))[1]
        jacobian = torch.func.vmap(torch.func.jacrev(one))(x, t)
        assert torch.autograd.gradgradcheck(lambda x: network(x, t).flatten()[:2], x.requires_grad_(), fast_mode=True)
    product = torch.einsum("bij,bj->bi", jacobian.reshape(2, v[0].numel(), -1), v.flatten(1))
    nb.check("jvp", forward.flatten(1), product, atol=1e-10)


@kinds
@pytest.mark.parametrize("time", TIME_EMBEDDINGS)
def test_weights_go_through_a_checkpoint(kind: str, time: str, tmp_path: Path) -> None:
    network, fresh = small(kind, classes=4, time=time), small(kind, classes=4, time=time)
    x, t = batch(kind)
    save_checkpoint(tmp_path / "net.safetensors", network.state_dict(), {})
    load_weights(fresh, read_checkpoint(tmp_path / "net.safetensors")[0], "net.safetensors")
    assert torch.equal(fresh(x, t, labels(3, 0, -1)), network(x, t, labels(3, 0, -1)))
    with pytest.raises(CheckpointError, match="net holds another model"):
        load_weights(small(kind, classes=5, time=time), network.state_dict(), "net")


# --- what is refused ---------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("shape", [(3, 9), (3, 9, 8, 8), (3,), (3, 2, 8)], ids=str)
def test_wrong_shapes_of_x_are_refused(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=re.escape(f"got {shape} of torch.float32")):
        small(kind)(torch.zeros(shape), torch.rand(3))


@kinds
def test_whole_numbers_are_refused(kind: str) -> None:
    x, t = batch(kind)
    with pytest.raises(DataError, match=r"of torch\.int64"):
        small(kind)(x.long(), t)
    with pytest.raises(DataError, match=r"t must be floating-point times in \[0, 1\], got dtype torch\.int64"):
        small(kind)(x, torch.tensor([1, 2, 3]))


@kinds
@pytest.mark.parametrize("shape", [(2,), (1,), (3, 1), (3, 1, 1, 1)], ids=str)
def test_wrong_shapes_of_t_are_refused(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=re.escape(f"shape (3,), got shape {shape}")):
        small(kind)(batch(kind)[0], torch.rand(shape))


@kinds
@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (torch.tensor([0, 1]), r"3 labels of dtype int64.* got shape \(2,\) and dtype torch\.int64"),
        (torch.tensor([[0], [1], [2]]), r"got shape \(3, 1\)"),
        (torch.tensor([0.0, 1.0, 2.0]), r"dtype torch\.float32"),
        (torch.tensor([0, 4, 1]), r"Labels must be from 0 to 3, or -1 for no condition, got labels from 0 to 4"),
        (torch.tensor([0, -2, 1]), r"got labels from -2 to 1"),
    ],
    ids=["few", "rank", "dtype", "large", "negative"],
)
def test_wrong_labels_are_refused(kind: str, condition: Tensor, said: str) -> None:
    x, t = batch(kind)
    with pytest.raises(DataError, match=said):
        small(kind, classes=4)(x, t, condition)


@kinds
def test_labels_for_a_network_without_classes_are_refused(kind: str) -> None:
    x, t = batch(kind)
    with pytest.raises(DataError, match="no classes: leave condition=None, or build it with classes=K"):
        small(kind)(x, t, labels(-1, -1, -1))


def test_sides_that_the_patch_does_not_divide_are_refused() -> None:
    with pytest.raises(DataError, match=r"multiples of the patch, 4, got \(28, 30\)"):
        DiT(dim=16)(torch.zeros(1, 1, 28, 30), 0.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SinusoidalEmbedding(7), "even and positive, got 7"),
        (lambda: FourierEmbedding(0), "even and positive, got 0"),
        (lambda: TimeMLP(0), "positive, got 0, 512 and 5"),
        (lambda: TimeMLP(layers=0), "positive, got 2, 512 and 0"),
        (lambda: TimeMLP(features=5), "even and positive, got 5"),
        (lambda: TimeMLP(time="fourrier"), "Unknown time embedding 'fourrier'. Did you mean 'fourier'"),
        (lambda: UNet(classes=0), "classes must be at least 1, or None for a network without labels, got 0"),
        (lambda: UNet(multipliers=()), r"must be positive, got 1, 32, 1 and \[\]"),
        (lambda: UNet(multipliers=(1, 0)), r"must be positive, got 1, 32, 1 and \[1, 0\]"),
        (lambda: UNet(attention=4), "from 0 to the 3 levels, got 4"),
        (lambda: UNet(attention=-1), "from 0 to the 3 levels, got -1"),
        (lambda: UNet(heads=3), "3 heads do not divide 128 channels"),
        (lambda: DiT(heads=0), "0 heads do not divide 128 channels"),
        (lambda: DiT(dim=130, heads=2), "dim a multiple of 4, got 1, 4, 130 and 4"),
        (lambda: DiT(depth=0), "must be positive and dim a multiple of 4, got 1, 4, 128 and 0"),
    ],
)
def test_sizes_that_make_no_network_are_refused(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(DataError, match=said):
        make()
