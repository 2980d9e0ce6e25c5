"""``convert_``: a model trained for integers becomes one that computes in them."""

from __future__ import annotations

from torch import nn

from gradbits.core.checks import check_module
from gradbits.core.errors import GraphError
from gradbits.nn.integer_build import build
from gradbits.nn.integer_model import IntegerModel
from gradbits.nn.qat import graph_forward


def convert_(model: nn.Module) -> IntegerModel:
    r"""Turn a model that was trained with ``qat_int8`` into one that infers in integers alone.

    Between the first quantization and the last dequantization there are int8 codes, int32 sums

    .. math:: a = b + \sum (q_1 - Z_1)\,q_2

    and fixed-point multipliers :math:`q_3 = Z_3 + \mathrm{round}(2^{-31-n} M_0\,a)`; no floating point. The results are
    those of the model in evaluation mode, bit for bit. Weights stay as int8, biases as int32, all else is dropped: the
    model cannot be trained further, and hooks on its layers are gone.

    Args:
        model: changed in place; its class becomes ``gradbits.nn.IntegerModel``.

    Returns:
        The same object.

    Raises:
        GraphError: the model was not quantized with ``qat_int8``, its ranges are not known yet, a step has no
            integer form, or a layer's numbers are not finite or have no fixed-point form; the message says which. The
            model stays as it was.

    References:
        Jacob et al., CVPR 2018, arXiv:1712.05877.

    >>> import torch, gradbits as gb
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _, x = gb.quantize_(net, "qat_int8"), torch.randn(16, 4)
    >>> _ = net(x)  # training would go on; one batch is enough to know the ranges
    >>> want = net.eval()(x).detach()
    >>> torch.equal(gb.convert_(net)(x), want), [name for name, _ in net.wiring]
    (True, ['input_1_codes', '_0', '_2', '_2_real'])
    """
    check_module(model)
    if isinstance(model, IntegerModel):
        return model
    forward = graph_forward(model)
    if forward is None:
        raise GraphError(
            "model: has no graph that was trained for integers; call quantize_(model, 'qat_int8') on it and train it "
            "(a single layer goes into nn.Sequential first)"
        )
    converted = build(forward).train(False)
    model.__class__ = IntegerModel
    model.__dict__.clear()
    model.__dict__.update(converted.__dict__)
    assert isinstance(model, IntegerModel)
    return model
