"""Saved bytes against counts made by hand."""

from __future__ import annotations

import torch
from torch import nn

from gradbits.observe import saved_bytes


def test_a_linear_layer_saves_its_input_once():
    layer = nn.Linear(32, 16)
    x = torch.randn(10, 32)
    assert saved_bytes(layer, lambda: layer(x)) == x.nbytes


def test_two_layers_that_share_an_input_save_it_once():
    pair = nn.ModuleList([nn.Linear(32, 16), nn.Linear(32, 8)])
    x = torch.randn(10, 32)
    assert saved_bytes(pair, lambda: (pair[0](x), pair[1](x))) == x.nbytes


def test_a_view_counts_with_the_whole_of_its_storage():
    layer = nn.Linear(32, 16)
    x = torch.randn(20, 32)
    assert saved_bytes(layer, lambda: layer(x[:5])) == x.nbytes


def test_parameters_and_buffers_are_left_out():
    norm = nn.BatchNorm1d(6)
    x = torch.randn(4, 6)
    assert saved_bytes(norm, lambda: norm(x)) == x.nbytes + 2 * 6 * 4  # the input, and the batch's mean and deviation


def test_a_second_run_gives_the_same_count_and_frees_what_it_held():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(128, 64)
    first = saved_bytes(model, lambda: model(x))
    assert first == x.nbytes + 128 * 64 * 4  # the input, and what ReLU and the second layer share
    assert saved_bytes(model, lambda: model(x)) == first


def test_a_custom_function_counts_with_what_it_saves():
    class Packed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.to(torch.int8))
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(100, requires_grad=True)
    assert saved_bytes(nn.Module(), lambda: Packed.apply(x)) == 100


def test_autocast_halves_the_activation_and_adds_the_cast_weight():
    layer = nn.Linear(32, 16)
    x = torch.randn(100, 32)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x).sum()

    saved = saved_bytes(layer, run)
    assert x.nbytes // 2 <= saved <= x.nbytes // 2 + layer.weight.nbytes // 2


def test_works_under_no_grad():
    layer = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert saved_bytes(layer, lambda: layer(x)) == x.nbytes
