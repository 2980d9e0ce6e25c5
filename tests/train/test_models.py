"""The models: shapes, sizes known from elsewhere, factories of the user."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, GradbitsError
from gradbits.train.models import MODELS, build_model

IMAGES = {"in_channels": 3, "image_size": (32, 32), "classes": 10}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "resnet20", "mobilenet"])
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (28, 28)])
def test_image_models_take_any_size(name, size):
    model = build_model(name, {"in_channels": 2, "image_size": size, "classes": 7})
    out = model(torch.randn(3, 2, *size))
    assert out.shape == (3, 7)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_resnet20_has_the_parameters_of_the_paper():
    model = build_model("resnet20", IMAGES)
    assert count(model) == 269_722  # 0.27 M in the paper's table; option A adds none
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == 20


def test_the_shortcut_of_option_a_subsamples_and_pads():
    model = build_model("resnet20", IMAGES)
    block = model.stages[1][0].eval()
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    x = torch.rand(2, 16, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_gpt_does_not_see_what_comes_later():
    model = build_model("gpt", {"vocabulary": 256, "context": 16}, {"d_model": 32, "layers": 2}).eval()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = 0
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert a.shape == (2, 16, 256)
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.equal(a[:, 9:], b[:, 9:])


def test_gpt_starts_near_the_uniform_distribution():
    torch.manual_seed(0)
    model = build_model("gpt", {})
    tokens = torch.randint(256, (4, 128))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert abs(loss.item() - 5.545) < 0.1  # ln 256


def test_the_seed_decides_the_weights():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(torch.cat([p.flatten() for p in build_model("small_cnn", IMAGES).parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def net(in_channels, classes, width=5):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, width),\n"
        "                         nn.Linear(width, classes))\n"
        "def anything(**kwargs):\n"
        "    module = nn.Linear(1, 1)\n"
        "    module.got = kwargs\n"
        "    return module\n"
        "def nothing():\n"
        "    return 3\n"
        "number = 4\n"
    )
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_models", None)


def test_a_factory_of_the_user_gets_what_it_takes(user_module):
    model = build_model("my_models:net", IMAGES, {"width": 6})
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 10)
    assert model[2].out_features == 6
    assert build_model("my_models:anything", IMAGES, {"depth": 2}).got == {**IMAGES, "depth": 2}


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("vgg", {}, "'resnet20'"),
        ("small_cnn", {"depth": 2}, "'depth'.*takes width"),
        ("small_cnn", {"width": 0}, "width=0"),
        ("small_cnn", {"width": "wide"}, "width='wide'"),
        ("gpt", {"d_model": 30}, "multiple of heads=4"),
        ("gpt", {"attention": "flash"}, "attention='flash'"),
        ("absent_module:net", {}, "absent_module"),
        ("my_models:absent", {}, "absent"),
        ("my_models:nothing", {}, "must return a torch.nn.Module, not int"),
        ("my_models:number", {}, "callable"),
        ("my_models:", {}, "package.module:factory"),
    ],
)
def test_what_cannot_be_built_says_why(user_module, name, options, named):
    with pytest.raises(GradbitsError, match=named):
        build_model(name, IMAGES, options)


def test_a_factory_that_needs_more_is_named(user_module):
    with pytest.raises(ArgumentError, match="in_channels"):
        build_model("my_models:net", {"vocabulary": 256})


def test_every_name_is_built():
    for name in MODELS:
        assert isinstance(build_model(name, {**IMAGES, "vocabulary": 256}), nn.Module)


def test_attention_as_products_is_the_fused_one_and_can_be_quantized():
    small = {"d_model": 16, "layers": 2, "heads": 2, "context": 12}
    torch.manual_seed(0)
    fused = build_model("gpt", {}, small)
    products = build_model("gpt", {}, {**small, "attention": "products"})
    products.load_state_dict(fused.state_dict(), strict=True)
    tokens = torch.randint(0, 256, (3, 12))
    torch.testing.assert_close(products(tokens), fused(tokens), rtol=1e-5, atol=1e-6)
    quantized = {}
    for attention in ("float", "int8_dynamic"):
        rows = gb.quantize_(products, gb.recipe("int4_transformer", attention=attention)).rows
        quantized[attention] = {row.name: row.recipe for row in rows if row.kind == "Matmul"}
    names = [f"blocks.{i}.attention.attend.{part}" for i in (0, 1) for part in ("scores", "values")]
    assert quantized["float"] == dict.fromkeys(names, "float")
    assert quantized["int8_dynamic"] == dict.fromkeys(names, "int8_dynamic")
    products(tokens).square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in products.parameters() if p.grad is not None)
