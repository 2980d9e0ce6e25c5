"""Quantized layers: the float classes with another forward, so parameters, hooks and references stay what they were."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gradbits.core.errors import ArgumentError
from gradbits.core.grain import PerChannel
from gradbits.core.noise import draw_seed
from gradbits.nn.assignment import Assignment, QuantizerStates
from gradbits.nn.bilinear import Bilinear, LinearProducts, MatmulProducts
from gradbits.nn.compiled import call, register
from gradbits.nn.conv_products import conv_products
from gradbits.nn.function import Call, QuantizedProduct
from gradbits.nn.matmul import Matmul
from gradbits.nn.refuse import refuse_script, refuse_transforms
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import State
from gradbits.recipes.recipe import Recipe


class Quantized:
    """What the quantized classes add to their float class; ``assign`` turns a float layer into one."""

    float_class: ClassVar[type[nn.Module]]
    assignment: Assignment

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the output for an input and the layer's parameters; for a product of two tensors ``weight`` is one."""
        raise NotImplementedError

    def like_output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor of the shape and memory order of the output, computed in float."""
        raise NotImplementedError

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        register(self)

    def products(self, input_size: tuple[int, ...]) -> Bilinear:
        """Return the layer's three products for an input of spatial size ``input_size``."""
        raise NotImplementedError

    def channels(self, role: str, axis: int) -> int:
        """Return how many scales an operand has along ``axis``."""
        raise NotImplementedError

    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: tuple[int, ...]) -> Any:
        """Return the layer's output for canonical operands."""
        link = self.assignment.link
        return self.product(x, weight, bias, size) if link is None else link.run(self, x, weight, bias, size)

    def product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        size: tuple[int, ...],
        given: tuple[Quantizer, State] | None = None,
    ) -> torch.Tensor:
        """Return the quantized product of canonical operands.

        Args:
            x, weight, bias: operands.
            size: spatial size of the input.
            given: quantizer of ``x`` and its state, where others keep it; else the layer's own.
        """
        a, module = self.assignment, self
        recipe = a.recipe
        if given is not None and recipe.output is not None:
            recipe = replace(recipe, output=replace(recipe.output, input=given[0]))

        def state_of(product: str, role: str) -> State:
            return given[1] if given is not None and role == "input" else self.state_of(product, role)

        device = x.device.type
        dtype = torch.promote_types(x.dtype, weight.dtype)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        training = bool(getattr(module, "training", True))
        recomputing = torch._C._current_graph_task_id() != -1  # activation checkpointing runs forward inside backward
        learned = self.learned()
        call = Call(
            products=self.products(size),
            recipe=recipe,
            state_of=state_of,
            compute=a.compute,
            # reentrant checkpointing runs the first forward without gradients: it must draw as the second will
            seed=draw_seed() if a.recipe.is_stochastic and (training or torch.is_grad_enabled()) else 0,
            update=training and not recomputing and given is None,
            training=training,
            on_nonfinite=a.on_nonfinite,
            name=a.name,
            dtype=dtype,
            learned=tuple(learned),
        )
        with torch.autocast(device, enabled=False):
            call = call.started({"input": x, "weight": weight}, bias)
            if bias is not None and a.recipe.output is not None and a.recipe.output.weight.range.scales_bias:
                bias = a.recipe.output.weight.range.scaled_bias(bias, call.state_of("output", "weight"))
            if a.seen is not None:
                return call.twice({"input": x, "weight": weight}, bias, a.seen)
            y: torch.Tensor = QuantizedProduct.apply(x, weight, bias, call, *learned.values())
        a.shapes = ({"input": x.shape, "weight": weight.shape, "gradient": y.shape}, size)
        return y

    def __prepare_scriptable__(self) -> None:  # the name that torch.jit.script looks for
        refuse_script(self.assignment.name)

    def weight_quantizer(self) -> Quantizer:
        """Return the quantizer of the weight in ``output``, in the layer's own layout."""
        output = self.assignment.recipe.output
        if output is None:
            raise ArgumentError(f"layer {self.assignment.name!r}: its recipe quantizes no weight in output")
        grain = self.products(spatial_example(self)).grain("weight", output.weight.grain)  # type: ignore[arg-type]
        return replace(output.weight, grain=grain)

    def learned(self) -> dict[tuple[str, str], torch.Tensor]:
        """Return the learned entries of the forward operands' states by (role, name)."""
        output = self.assignment.recipe.output
        if output is None:
            return {}
        quantizers = {"input": output.input, "weight": output.weight}
        return {
            (role, name): self.state_of("output", role)[name]
            for role, q in quantizers.items()
            for name in q.range.learned
        }

    def state_of(self, product: str, role: str) -> State:
        """Return the state of an operand's quantizer; empty where it remembers nothing."""
        slot = self.assignment.slots.get((product, role))
        states = getattr(self, "quantizers", None)
        if slot is None or states is None:
            return {}
        prefix = f"{slot}_"
        return {name[len(prefix) :]: t for name, t in states.entries().items() if name.startswith(prefix)}


def init_states(layer: Quantized, recipe: Recipe) -> tuple[QuantizerStates | None, dict[tuple[str, str], str]]:
    """Return a layer's range states and which operand uses which."""
    states = QuantizerStates()
    slots: dict[tuple[str, str], str] = {}
    known: dict[tuple[str, Quantizer], str] = {}
    for product, role, q in recipe.operands():
        if (role, q) not in known:
            if not q.init_state(1):
                continue
            groups = layer.channels(role, q.grain.axis) if isinstance(q.grain, PerChannel) else 1
            initial = q.init_state(groups)
            known[role, q] = f"{product}_{role}"
            for name, value in initial.items():
                full = f"{product}_{role}_{name}"
                if name in q.range.learned:
                    states.register_parameter(full, nn.Parameter(value))
                else:
                    states.register_buffer(full, value)
        slots[product, role] = known[role, q]
    return (states if known else None), slots


def _check_size(layer: Quantized, x: torch.Tensor, axes: tuple[int, ...], size: int, what: str) -> None:
    """Refuse an input that the layer does not take, first of all of another shape: kernels trust the sizes they get.

    Args:
        layer: names it.
        x: its input.
        axes: how many axes it may have; with one entry, that many or more. The first entry counts the axes from the
            checked one to the last.
        size: what the checked axis must have.
        what: what that axis holds.
    """
    refuse_transforms(layer.assignment.name, x)
    enough = x.dim() >= axes[0] if len(axes) == 1 else x.dim() in axes
    if not enough or x.shape[-axes[0]] != size:
        legal = f"at least {axes[0]}" if len(axes) == 1 else " or ".join(map(str, axes))
        raise ArgumentError(
            f"input: shape {tuple(x.shape)} does not fit layer {layer.assignment.name!r}; must have {legal} axes and "
            f"{size} {what}"
        )


class QuantizedLinear(Quantized, nn.Linear):
    """``torch.nn.Linear`` with quantized products."""

    float_class = nn.Linear

    def products(self, input_size: tuple[int, ...]) -> Bilinear:
        return LinearProducts(input_size)

    def channels(self, role: str, axis: int) -> int:
        sizes = {"input": self.in_features, "gradient": self.out_features}
        return sizes.get(role, self.weight.shape[axis])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input`` [..., in_features] times the transposed weight plus the bias."""
        return call(self, input, self.weight, self.bias)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        _check_size(self, x, (1,), weight.shape[1], "features")
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        y: torch.Tensor = self.run(rows, weight, bias, tuple(x.shape[1:-1]))
        return y.view(*x.shape[:-1], self.out_features)

    def like_output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])


class QuantizedMatmul(Quantized, Matmul):
    """``gradbits.nn.Matmul`` with quantized products."""

    float_class = Matmul

    def products(self, input_size: tuple[int, ...]) -> Bilinear:
        return MatmulProducts()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``a`` [..., M, K] times ``b`` [..., K, N]."""
        return call(self, a, b, None)

    def like_output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.matmul(x, weight).contiguous()

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        a, b = x, weight
        for operand, name in ((a, "a"), (b, "b")):
            refuse_transforms(self.assignment.name, operand)
            if operand.dim() == 0:
                raise ArgumentError(f"{name}: has no axes; a matrix product needs at least one")
        if a.dim() == 1:
            return self.compute(a.unsqueeze(0), b).squeeze(-1 if b.dim() == 1 else -2)
        if b.dim() == 1:
            return self.compute(a, b.unsqueeze(1)).squeeze(-1)
        if a.shape[-1] != b.shape[-2]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise ArgumentError(f"a, b: shapes {shapes} of layer {self.assignment.name!r} do not fit together")
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, b = (x.expand(*lead, *x.shape[-2:]).reshape(lead.numel(), *x.shape[-2:]) for x in (a, b))
        y: torch.Tensor = self.run(a, b, None, ())
        return y.view(*lead, *y.shape[-2:])


class _QuantizedConv(Quantized):
    """Shared by the convolutions of 1, 2 and 3 dimensions."""

    def products(self, input_size: tuple[int, ...]) -> Bilinear:
        layer: Any = self
        padding = (0,) * len(input_size) if isinstance(layer.padding, str) else tuple(layer.padding)
        if layer.padding_mode != "zeros":
            padding = (0,) * len(input_size)
        if layer.padding == "same" and layer.padding_mode == "zeros":
            low, high = _same_padding(layer)
            padding = low if low == high else (0,) * len(input_size)
        kernel = tuple(layer.kernel_size)
        return conv_products(
            tuple(layer.stride), padding, tuple(layer.dilation), layer.groups, input_size, kernel, transposed=False
        )

    def channels(self, role: str, axis: int) -> int:
        layer: Any = self
        sizes = {"input": layer.in_channels, "gradient": layer.out_channels}
        return int(sizes.get(role, layer.weight.shape[axis]))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the convolution of ``input`` [N, C, *] or [C, *]."""
        layer: Any = self
        return call(self, input, layer.weight, layer.bias)

    def like_output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        layer: Any = self
        return _in_format_of(layer._conv_forward(x, weight.to(x.dtype), None), x, weight)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        layer: Any = self
        input = x
        spatial = len(layer.kernel_size)
        _check_size(self, input, (spatial + 1, spatial + 2), layer.in_channels, "channels")
        x = input if input.dim() == spatial + 2 else input.unsqueeze(0)
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        elif layer.padding == "same":
            low, high = _same_padding(layer)
            if low != high:  # an even kernel pads one more at the end, as PyTorch does
                x = F.pad(x, [n for pair in zip(reversed(low), reversed(high), strict=True) for n in pair])
        size = tuple(x.shape[2:])
        products: Any = self.products(size)
        if min(products.geometry.output_size) < 1:
            raise ArgumentError(
                f"input: padded spatial size {size} of layer {self.assignment.name!r} is smaller than its kernel "
                f"{tuple(layer.kernel_size)} with dilation {tuple(layer.dilation)}"
            )
        y = self.run(x, weight, bias, size)
        return _in_format_of(y if input.dim() == spatial + 2 else y.squeeze(0), input, weight)


def _same_padding(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)


def _in_format_of(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``y`` channels-last where PyTorch's own convolution would, contiguous otherwise.

    Kernels may prefer one order, but a caller's ``view`` must go on working.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(x.dim())
    if wanted is not None and any(
        t.is_contiguous(memory_format=wanted) and not t.is_contiguous() for t in (x, weight) if t.dim() == x.dim()
    ):
        return y.contiguous(memory_format=wanted)
    return y.contiguous()


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """``torch.nn.Conv1d`` with quantized products."""

    float_class = nn.Conv1d


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """``torch.nn.Conv2d`` with quantized products."""

    float_class = nn.Conv2d


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """``torch.nn.Conv3d`` with quantized products."""

    float_class = nn.Conv3d


class _QuantizedConvTranspose(Quantized):
    """Shared by the transposed convolutions; each is the ``grad_input`` of a plain one."""

    def products(self, input_size: tuple[int, ...]) -> Bilinear:
        layer: Any = self
        padding, kernel = tuple(layer.padding), tuple(layer.kernel_size)
        return conv_products(
            tuple(layer.stride), padding, tuple(layer.dilation), layer.groups, input_size, kernel, transposed=True
        )

    def channels(self, role: str, axis: int) -> int:
        layer: Any = self
        sizes = {"input": layer.in_channels, "gradient": layer.out_channels}
        return int(sizes.get(role, layer.weight.shape[1 - axis]))

    @torch.compiler.disable(recursive=True)
    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Return the transposed convolution of ``input`` [N, C, *] or [C, *]."""
        layer: Any = self
        spatial = len(layer.kernel_size)
        _check_size(self, input, (spatial + 1, spatial + 2), layer.in_channels, "channels")
        x = input if input.dim() == spatial + 2 else input.unsqueeze(0)
        extra = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, spatial, layer.dilation
        )
        size = tuple(
            (n - 1) * s - 2 * p + d * (k - 1) + e + 1
            for n, s, p, d, k, e in zip(
                x.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, extra, strict=True
            )
        )
        if min(size) < 1:
            raise ArgumentError(f"input: layer {self.assignment.name!r} would give the spatial size {size}")
        y = self.run(x, layer.weight, layer.bias, size)
        return _in_format_of(y if input.dim() == spatial + 2 else y.squeeze(0), input, layer.weight)


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with quantized products."""

    float_class = nn.ConvTranspose1d


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with quantized products."""

    float_class = nn.ConvTranspose2d


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with quantized products."""

    float_class = nn.ConvTranspose3d


QUANTIZED_CLASSES: dict[type[nn.Module], type[Any]] = {
    c.float_class: c
    for c in (
        QuantizedLinear,
        QuantizedMatmul,
        QuantizedConv1d,
        QuantizedConv2d,
        QuantizedConv3d,
        QuantizedConvTranspose1d,
        QuantizedConvTranspose2d,
        QuantizedConvTranspose3d,
    )
}


def spatial_example(layer: nn.Module) -> tuple[int, ...]:
    """Return some legal spatial input size of a layer, for questions that do not depend on it."""
    kernel = getattr(layer, "kernel_size", ())
    dilation = getattr(layer, "dilation", ())
    return tuple(math.prod((k, d)) + 1 for k, d in zip(kernel, dilation, strict=True))
