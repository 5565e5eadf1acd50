"""Shapes, gradients and errors of the networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nblib.errors import DataError
from nblib.nets import ACTIVATIONS, MLP, ConvDecoder, ConvEncoder, ResidualBlock, activation, randn_rows

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 12, 20), (2, 5, 33), (1, 1, 1)]


def shaken(module: nn.Module) -> nn.Module:
    """Some layers start at zero, and stop the gradient of those before them: move every parameter away."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def assert_every_gradient(module: nn.Module, output: Tensor) -> None:
    output.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_encoder_maps_images_to_vectors(shape: tuple[int, ...]) -> None:
    encoder = shaken(ConvEncoder(shape, 6, width=4))
    output = encoder(torch.rand(2, *shape))
    assert output.shape == (2, 6)
    assert_every_gradient(encoder, output)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_decoder_maps_vectors_to_images(shape: tuple[int, ...]) -> None:
    decoder = shaken(ConvDecoder(5, shape, 7, width=4))
    output = decoder(torch.randn(2, 5))
    assert output.shape == (2, 7, *shape[1:])
    assert_every_gradient(decoder, output)


@pytest.mark.parametrize(
    ("shape", "smallest"),
    [((1, 8, 8), (4, 8, 8)), ((1, 9, 9), (8, 5, 5)), ((1, 28, 28), (16, 7, 7)), ((3, 32, 12), (8, 16, 6))],
    ids=str,
)
def test_the_pyramid_halves_until_a_side_is_at_most_8(shape: tuple[int, ...], smallest: tuple[int, ...]) -> None:
    assert ConvDecoder(5, shape, 1, width=4).start == smallest
    assert ConvEncoder(shape, 2, width=4).head.in_features == smallest[0] * smallest[1] * smallest[2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mlp_flattens_its_input(shape: tuple[int, ...]) -> None:
    mlp = MLP([shape[0] * shape[1] * shape[2], 9, 4])
    output = mlp(torch.rand(3, *shape) + 0.1)
    assert output.shape == (3, 4)
    assert_every_gradient(mlp, output)


def test_mlp_has_no_activation_after_its_last_layer() -> None:
    mlp = MLP([3, 5, 2], "sigmoid")
    assert [type(layer) for layer in mlp] == [nn.Flatten, nn.Linear, nn.Sigmoid, nn.Linear]


def test_mlp_without_hidden_layers_is_affine() -> None:
    mlp = MLP([3, 2])
    a, b = torch.randn(2, 1, 3)
    torch.testing.assert_close(mlp(a) + mlp(b), mlp(a + b) + mlp(torch.zeros(1, 3)))


@pytest.mark.parametrize("sizes", [[], [3], [3, 0], [3, -1, 2]], ids=str)
def test_mlp_refuses_sizes_that_make_no_network(sizes: list[int]) -> None:
    with pytest.raises(DataError, match=f"got \\{sizes}"):
        MLP(sizes)


def test_a_residual_block_starts_as_the_identity() -> None:
    x = torch.randn(2, 12, 5, 5)
    assert torch.equal(ResidualBlock(12)(x), x)
    assert not torch.equal(shaken(ResidualBlock(12))(x), x)


def test_more_blocks_mean_more_parameters() -> None:
    one, two = (sum(p.numel() for p in ConvEncoder((1, 16, 16), 2, width=4, blocks=b).parameters()) for b in (1, 2))
    assert two > one


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_made_anew(name: str) -> None:
    one, two = activation(name), activation(name)
    assert one is not two
    assert one(torch.linspace(-1, 1, 5)).shape == (5,)


@pytest.mark.parametrize(("wrong", "near"), [("tan", "tanh"), ("relo", "relu"), ("SiLU", "silu")])
def test_an_unknown_activation_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(DataError, match=rf"Unknown activation '{wrong}'. Did you mean '{near}'\?"):
        activation(wrong)


@pytest.mark.parametrize("shape", [(2,), (20,), (3, 4)], ids=str)
def test_row_i_of_the_noise_is_the_same_whatever_n_is(shape: tuple[int, ...]) -> None:
    def rows(n: int) -> Tensor:
        return randn_rows(n, shape, torch.zeros(()), torch.Generator().manual_seed(4))

    for n in (0, 1, 5):
        assert rows(n).shape == (n, *shape)
        assert torch.equal(rows(n), rows(17)[:n])


def test_noise_drawn_at_once_would_depend_on_n() -> None:
    few, many = (torch.randn(n, 3, generator=torch.Generator().manual_seed(4)) for n in (5, 17))
    assert not torch.equal(few, many[:5])


def test_the_noise_follows_the_dtype_of_the_weights() -> None:
    assert randn_rows(2, (3,), torch.zeros((), dtype=torch.float64)).dtype == torch.float64
