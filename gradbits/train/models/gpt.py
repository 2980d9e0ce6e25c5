"""A small decoder-only transformer over bytes."""

from __future__ import annotations

import math

import torch
from torch import nn

from gradbits.core.checks import check_choice, check_integer
from gradbits.core.errors import ArgumentError
from gradbits.nn.attention import ScaledDotProductAttention
from gradbits.nn.matmul import Matmul


class Products(nn.Module):
    """Causal attention as two products with a softmax between them, which follow what a recipe says of each operand."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.values = Matmul(), Matmul()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return what ``scaled_dot_product_attention`` does for [batch, heads, length, width]."""
        length, width = query.shape[-2:]
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = self.scores(query * width**-0.5, key.mT).masked_fill(later, -math.inf)
        y: torch.Tensor = self.values(scores.softmax(-1), value)
        return y


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, d_model: int, heads: int, attention: str) -> None:
        super().__init__()
        self.heads = heads
        self.attend = Products() if attention == "products" else ScaledDotProductAttention(causal=True)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, length, d_model]; position t sees positions up to t."""
        batch, length, d_model = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, d_model // self.heads)
        query, key, value = (part.transpose(1, 2) for part in split.unbind(2))
        y = self.attend(query, key, value)
        return self.out(y.transpose(1, 2).reshape(batch, length, d_model))


class Block(nn.Module):
    """Attention and a two-layer GELU network, each behind a layer norm and around a shortcut."""

    def __init__(self, d_model: int, heads: int, attention: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, heads, attention)
        self.norm2 = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, length, d_model]."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Embeddings of bytes and positions, pre-norm blocks, a final norm and a linear head."""

    def __init__(
        self, vocabulary: int, context: int, d_model: int, layers: int, heads: int, attention: str
    ) -> None:
        super().__init__()
        self.context = context
        self.bytes = nn.Embedding(vocabulary, d_model)
        self.positions = nn.Embedding(context, d_model)
        self.blocks = nn.Sequential(*(Block(d_model, heads, attention) for _ in range(layers)))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            # 2 * layers outputs are added to one another: scaled so that their sum has the variance of one
            if name.endswith(("attention.out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits, [batch, length, vocabulary], for int64 ``tokens`` [batch, length], length at most context."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.bytes(tokens) + self.positions(positions))))


def gpt(
    *,
    vocabulary: int = 256,
    context: int = 128,
    d_model: int = 128,
    layers: int = 4,
    heads: int = 4,
    attention: str = "fused",
) -> nn.Module:
    """Return a byte-level decoder.

    Args:
        vocabulary: byte values.
        context: bytes that it sees at most.
        d_model: width of the residual stream; a multiple of ``heads``.
        layers: blocks.
        heads: attention heads of a block.
        attention: ``"fused"``, ``gradbits.nn.ScaledDotProductAttention``: PyTorch's function in float, one kernel of
            ours in 8 bits; or ``"products"``, the same as two ``gradbits.nn.Matmul``, whose operands follow a recipe.

    Raises:
        ArgumentError: ``d_model`` is not a multiple of ``heads``.
    """
    for name, value in (("d_model", d_model), ("layers", layers), ("heads", heads), ("context", context)):
        check_integer(value, name, 1)
    check_choice(attention, "attention", ("fused", "products"))
    if d_model % heads:
        raise ArgumentError(f"d_model={d_model}: must be a multiple of heads={heads}")
    return GPT(vocabulary, context, d_model, layers, heads, attention)
