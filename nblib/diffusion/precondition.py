"""Preconditioning: a network whose inputs and targets have unit variance at every noise level."""

from __future__ import annotations

from torch import Tensor, nn

from nblib.errors import DataError
from nblib.paths import Path, expand

__all__ = ["Preconditioned"]


class Preconditioned(nn.Module):
    r"""A data prediction made of a raw network F, for any Gaussian path and data of standard deviation s.

    .. math:: D(x,t)=c_{\rm skip}\,x+c_{\rm out}\,F\big(c_{\rm in}\,x,\,c_{\rm noise}\big)

    .. math:: c_{\rm skip}=\frac{a\,s^2}{a^2s^2+b^2},\qquad c_{\rm out}=\frac{b\,s}{\sqrt{a^2s^2+b^2}},\qquad
              c_{\rm in}=\frac1{\sqrt{a^2s^2+b^2}},\qquad c_{\rm noise}=\tfrac14\log\frac ba

    The input of F and its target :math:`(x_1-c_{\rm skip}x_t)/c_{\rm out}` have unit variance, and
    :math:`c_{\rm skip}` makes :math:`c_{\rm out}` as small as possible. With a = 1 and b = sigma these are the
    formulas of the source. F is given :math:`c_{\rm noise}` in place of the time.

    Args:
        network: F, ``net(x, c_noise, condition)``. path: with a > 0 and b > 0. data_std: s.

    Source: Karras et al. (2022), table 1 and appendix B.6.
    """

    def __init__(self, network: nn.Module, path: Path, data_std: float = 0.5) -> None:
        super().__init__()
        if not data_std > 0:
            raise DataError(f"data_std must be positive, got {data_std}: give the standard deviation of the data.")
        self.network, self.path, self.data_std = network, path, data_std

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(c_skip, c_out, c_in, c_noise)``, each ``(B,)`` for times ``(B,)``."""
        a, b, *_ = self.path.coefficients(t, t)
        variance = (a * self.data_std) ** 2 + b**2
        c_skip = a * self.data_std**2 / variance
        return c_skip, b * self.data_std / variance.sqrt(), 1 / variance.sqrt(), 0.25 * (b / a).log()

    def weight(self, t: Tensor) -> Tensor:
        r"""The weight :math:`1/c_{\rm out}^2` of the squared error of D, which is weight 1 for that of F: ``(B,)``."""
        return self.coefficients(t)[1] ** -2

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in, c_noise = self.coefficients(t)
        raw = self.network(expand(c_in, x) * x, c_noise, condition)
        return expand(c_skip, x) * x + expand(c_out, x) * raw
