import math
import sys

import pytest
import torch
from torch import nn

from fastsfvae.models import ModelConfig, build


def _weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().double() for p in module.parameters()]


@pytest.mark.parametrize(
    ("name", "hidden", "activation"),
    [("mlp", (512, 256), torch.relu), ("tanh", (200, 200), torch.tanh)],
)
def test_dense_models_compute_the_papers_layers(name, hidden, activation):
    torch.manual_seed(0)
    encoder, decoder = build(ModelConfig(name, latent_dim=5))
    x, z = torch.rand(3, 1, 28, 28), torch.randn(3, 5)

    def dense(inputs, module, sizes):
        value, parameters = inputs.double().flatten(1), _weights(module)
        assert [tuple(w.shape) for w in parameters[::2]] == list(
            zip(sizes[1:], sizes[:-1], strict=True)
        )
        for layer, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
            value = value @ weight.T + bias
            value = activation(value) if 2 * layer + 2 < len(parameters) else value
        return value

    posterior = dense(x, encoder, (784, *hidden, 10))
    mean, log_var = encoder(x)
    torch.testing.assert_close(mean.double(), posterior[:, :5], rtol=0, atol=2e-6)
    torch.testing.assert_close(log_var.double(), posterior[:, 5:], rtol=0, atol=2e-6)
    output = dense(z, decoder, (5, *reversed(hidden), 784)).reshape(3, 1, 28, 28)
    torch.testing.assert_close(decoder(z).double(), output, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("shape", "encoder_widths", "millions"),
    [
        ((3, 64, 64), (3, 32, 32, 64, 64, 256), (0.26, 1.05, 2.10, 4.19, 1.57)),
        ((1, 64, 64), (1, 32, 32, 64, 64, 256), (0.26, 1.05, 2.10, 4.19, 0.52)),
        ((1, 32, 32), (1, 32, 64, 64, 256), (0.26, 1.05, 2.10, 0.13)),
    ],
)
def test_convolutional_model_has_the_papers_layers(shape, encoder_widths, millions):
    encoder, decoder = build(ModelConfig("conv", latent_dim=6, image_shape=shape))
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert (convolutions[0].in_channels, *(c.out_channels for c in convolutions)) == encoder_widths

    # Multiply-adds of one tangent through each transposed convolution: 16 taps, Ci, Co, positions.
    costs = []
    for layer in decoder:
        if isinstance(layer, nn.ConvTranspose2d):
            layer.register_forward_hook(
                lambda layer, inputs, output: costs.append(
                    inputs[0][0].numel() * layer.out_channels * math.prod(layer.kernel_size) / 1e6
                )
            )
    assert decoder(torch.randn(2, 6)).shape == (2, *shape)
    assert [round(cost, 2) for cost in costs] == list(millions)
    assert [t.shape for t in encoder(torch.rand(2, *shape))] == [(2, 6), (2, 6)]


def test_sigmoid_is_the_last_operation():
    outputs = []
    for activation in ("none", "sigmoid"):
        torch.manual_seed(1)
        _, decoder = build(ModelConfig(latent_dim=2, output_activation=activation))
        outputs.append(decoder(torch.ones(1, 2)))
    assert torch.equal(outputs[0].sigmoid(), outputs[1])


def test_initialisation():
    torch.manual_seed(0)
    for init in ("kaiming", "xavier"):
        for module in build(ModelConfig(init=init)):
            for layer in (m for m in module.modules() if isinstance(m, nn.Linear)):
                fan_out, fan_in = layer.weight.shape
                assert not layer.bias.any()
                variance = 2 / fan_in if init == "kaiming" else 2 / (fan_in + fan_out)
                # The variance of N normal draws deviates by sqrt(2 / N): five of those.
                tolerance = 5 * math.sqrt(2 / layer.weight.numel())
                assert abs(layer.weight.var().item() / variance - 1) < tolerance
                if init == "xavier":
                    assert layer.weight.abs().max() <= math.sqrt(3 * variance)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "vit"}, "model='vit' is not one of 'mlp', 'tanh', 'linear', 'conv'"),
        ({"latent_dim": 0}, "latent_dim=0 must be at least 1"),
        ({"image_shape": (28, 28)}, "image_shape=\\(28, 28\\) must be three positive sizes"),
        ({"output_activation": "relu"}, "output_activation='relu'"),
        ({"init": "zeros"}, "init='zeros'"),
    ],
)
def test_bad_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


def test_convolutional_model_refuses_other_sizes():
    with pytest.raises(ValueError, match="takes 32x32 or 64x64 images, not 28x28"):
        build(ModelConfig("conv"))


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Write a module into the working directory, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "custom_model.py").write_text(
        "from fastsfvae.models import ModelConfig, build as builtin\n"
        "from dataclasses import replace\n"
        "from torch import nn\n"
        "def good(config):\n    return builtin(replace(config, name='tanh'))\n"
        "def one(config):\n    return nn.Identity()\n"
        "def plain(config):\n    return nn.Flatten(), good(config)[1]\n"
        "def wide(config):\n"
        "    return good(config)[0], nn.Linear(config.latent_dim, 784)\n"
        "number = 3\n"
    )
    yield
    sys.modules.pop("custom_model", None)


def test_custom_builder(custom):
    torch.manual_seed(0)
    encoder, decoder = build(ModelConfig("custom_model:good", latent_dim=3))
    torch.manual_seed(0)
    expected = build(ModelConfig("tanh", latent_dim=3))
    for module, other in zip((encoder, decoder), expected, strict=True):
        assert module.training
        assert all(map(torch.equal, module.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:build", "cannot be imported: No module named 'no_such_module'"),
        ("custom_model:missing", "cannot be imported: .* has no attribute 'missing'"),
        ("custom_model:number", "is not callable"),
        ("custom_model:one", "returned Identity: return \\(encoder, decoder\\)"),
        ("custom_model:plain", "must return the tuple \\(mean, log_var\\), each \\(2, 16\\)"),
        ("custom_model:wide", "returned \\(2, 784\\), but the images are \\(2, 1, 28, 28\\)"),
    ],
)
def test_bad_custom_builder(custom, name, message):
    with pytest.raises(ValueError, match=message):
        build(ModelConfig(name))
