"""Integer products simulated in float64, which holds every sum of codes exactly: the other side of law 2."""

from __future__ import annotations

import torch

from gradbits.kernels.dispatch import Epilogue, Kernel, Request
from gradbits.kernels.geometry import ConvGeometry, in_result_order, result_is_last


def matmul(a: torch.Tensor, b: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """Return the product of codes ``a`` [..., M, K] and ``b`` [..., K, N]."""
    return epilogue.apply_(a.double() @ b.double())


def conv_output(x: torch.Tensor, w: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the convolution of codes ``x`` [N, Ci, *] and ``w`` [Co, Ci/groups, *]."""
    g = geometry
    # cuDNN may pick an inexact algorithm (FFT, Winograd) even for float64
    with torch.backends.cudnn.flags(enabled=False):
        y = torch.convolution(
            x.double(), w.double(), None, g.stride, g.padding, g.dilation, False, (0,) * g.spatial, g.groups
        )
    return in_result_order(epilogue.apply_(y), result_is_last(x, w))


def _backward(
    grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, g: ConvGeometry, mask: tuple[bool, bool, bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.backends.cudnn.flags(enabled=False):
        return torch.ops.aten.convolution_backward(
            grad, x, w, None, g.stride, g.padding, g.dilation, False, (0,) * g.spatial, g.groups, mask
        )


def conv_grad_input(grad: torch.Tensor, w: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the gradient of the input from codes ``grad`` [N, Co, *] and ``w`` [Co, Ci/groups, *]."""
    shape = (grad.shape[0], w.shape[1] * geometry.groups, *geometry.input_size)
    x = torch.empty(shape, dtype=torch.float64, device=grad.device)
    y = epilogue.apply_(_backward(grad.double(), x, w.double(), geometry, (True, False, False))[0])
    return in_result_order(y, result_is_last(grad, w))


def conv_grad_weight(grad: torch.Tensor, x: torch.Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> torch.Tensor:
    """Return the gradient of the weight from codes ``grad`` [N, Co, *] and ``x`` [N, Ci, *]."""
    shape = (grad.shape[1], x.shape[1] // geometry.groups, *geometry.kernel_size)
    w = torch.empty(shape, dtype=torch.float64, device=grad.device)
    y = epilogue.apply_(_backward(grad.double(), x.double(), w, geometry, (False, True, False))[1])
    return in_result_order(y, result_is_last(grad, x))


def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this backend."""

    def always(request: Request) -> str | None:
        return None

    ops = (matmul, conv_output, conv_grad_input, conv_grad_weight)
    return tuple(Kernel(f.__name__, "simulate", f, always) for f in ops)
