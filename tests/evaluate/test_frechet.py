"""FID and KID: which extractors are taken, and what is said of the others."""

import math
from unittest import mock

import pytest
import torch
from torch import nn

from fastsfvae import evaluate
from fastsfvae.evaluate.frechet import _digest, load_extractor

pytest.importorskip("torchmetrics")


class Extractor(nn.Module):
    """A network that is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def images(count=40, seed=0, channels=1):
    return torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


def batch_norm():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    network[1].running_mean.normal_()
    return network.requires_grad_(False)


def test_batch_norm_counts_in_evaluation_mode_and_is_left_as_it_was():
    network = batch_norm()
    network[0].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = evaluate.frechet_distance(images(), images(30, 1), network)
    assert (network.training, network[0].training, network[1].training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    # The same numbers as in evaluation mode all along, whatever the batches.
    network.eval()
    assert found == evaluate.frechet_distance(images(), images(30, 1), network)
    assert found == evaluate.frechet_distance(images(), images(30, 1).split(7), network)
    network[1].running_var.mul_(2)
    other = evaluate.frechet_distance(images(), images(30, 1), network)
    assert other.weights_sha256 != found.weights_sha256 and other.fid != found.fid


class State(nn.Module):
    """A module with a state of many kinds; `last` is the last entry of its extra state."""

    def __init__(self, last=1.0, **changed):
        super().__init__()
        self.last = last
        kinds = {
            "count": torch.tensor(3),
            "flag": torch.tensor(True),
            "bf16": torch.ones(2, dtype=torch.bfloat16),
            "turned": torch.tensor([1 + 2j, 3 - 1j]).conj(),
            "none": torch.empty(0, 3),
            "bytes": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "sparse": torch.eye(3).to_sparse(),
            "across": torch.arange(6.0).view(2, 3).T,
        }
        for name, value in (kinds | changed).items():
            self.register_buffer(name, value)

    def get_extra_state(self):
        return {"version": 1, "tensors": (torch.ones(2), torch.tensor(self.last))}

    def set_extra_state(self, state):
        pass


def test_the_digest_takes_in_every_kind_of_state():
    digests = [_digest(State()), _digest(State())]
    digests += [_digest(State(count=torch.tensor(4))), _digest(State(flag=torch.tensor(False)))]
    digests += [_digest(State(last=2.0)), _digest(State(sparse=2 * torch.eye(3).to_sparse()))]
    digests += [_digest(State(turned=torch.tensor([1 + 2j, 3 - 1j])))]
    assert digests[0] == digests[1] and len(set(digests)) == len(digests) - 1
    # Plain weights have the digest that they always had.
    linear = nn.Linear(2, 1)
    nn.init.constant_(linear.weight, 0.5)
    nn.init.zeros_(linear.bias)
    assert _digest(linear) == PLAIN


PLAIN = "a6de5d1587f71ac066981e02fa9bf74d3ee7e9814c2ca67a62b7cda7a6fe1fa1"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: 1 / 0, "extractor Extractor failed on real images.*division by zero"),
        (lambda x: nn.functional.conv2d(x, torch.ones(2, 3, 1, 1)), "failed on .*2, 1, 4, 4"),
        (lambda x: torch.autograd.grad(x.sum(), x)[0], "failed on real images"),
        (lambda x: (x.flatten(1),), "returned tuple for real images"),
        (lambda x: None, "returned NoneType"),
        (lambda x: x.flatten(1).squeeze(), r"returned \(16,\) for real images \(1, 1, 4, 4\)"),
        (lambda x: x, r"returned \(2, 1, 4, 4\) for"),
        (lambda x: x.flatten(1).long(), "16 features of torch.int64"),
        (lambda x: x.flatten(1)[:, :0], "returned 0 features"),
        (lambda x: x.flatten(1) / 0, "2 of 2 real images have features that are not finite"),
        (lambda x: (x.flatten(1) * 1e6).half(), "2 of 2 real images"),
        (lambda x: nn.functional.dropout(x.flatten(1)), "alone in its batch"),
        (lambda x: x.flatten(1) - x.flatten(1).mean(0), "alone in its batch"),
        (nn.BatchNorm2d(1, track_running_stats=False), "returned"),
        (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten()), "alone in"),
    ],
)
def test_an_extractor_that_does_not_fit_is_found_on_two_images(function, message):
    seen = []

    def recorded(x):
        seen.append(len(x))
        return function(x)

    with pytest.raises(ValueError, match=message) as caught:
        evaluate.frechet_distance(images(), images(), Extractor(recorded))
    assert "\n" not in str(caught.value) and max(seen) <= 2


def test_both_sets_are_tried_before_either_is_gone_through():
    seen = []

    def three_channels(x):
        seen.append(len(x))
        return x[:, :1].flatten(1) if x.shape[1] == 1 else None

    with pytest.raises(ValueError, match="NoneType for generated images"):
        evaluate.frechet_distance(images(), images(channels=3), Extractor(three_channels))
    assert max(seen) <= 2
    broken = images()
    broken[7] = math.nan
    with pytest.raises(ValueError, match="1 of 40 generated images have features that are not"):
        evaluate.frechet_distance(images(), broken, nn.Flatten())
    with pytest.raises(ValueError, match="16 features for real images and 48 for generated"):
        evaluate.frechet_distance(images(), images(channels=3), nn.Flatten())
    with pytest.raises(ValueError, match="no generated images"):
        evaluate.frechet_distance(images(), [], nn.Flatten())
    with pytest.raises(TypeError, match="extractor is a function"):
        evaluate.frechet_distance(images(), images(), lambda x: x.flatten(1))


def test_half_precision_features_and_the_spread_of_kid():
    half = Extractor(lambda x: x.flatten(1).half())
    found = evaluate.frechet_distance(images(), images(30, 1), half)
    exact = evaluate.frechet_distance(images(), images(30, 1), nn.Flatten())
    # A pixel is rounded by 2^-12 at most; the distance is of squares of differences below 1.
    assert found.fid == pytest.approx(exact.fid, abs=16 * 2**-10)
    assert exact.kid_spread > 0
    # All subsets are the whole set: nothing is known of a spread.
    assert math.isnan(evaluate.frechet_distance(images(2), images(2, 1), half).kid_spread)


def _kid(a, b):
    """The unbiased squared maximum mean discrepancy of rows, as it reads."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(a)
    within = sum(k.sum() - k.trace() for k in (kernel(a, a), kernel(b, b))) / (n * (n - 1))
    return float(within - 2 * kernel(a, b).mean())


@pytest.mark.parametrize("count", [4, 5, 60, 1001])
def test_the_spread_of_kid_is_that_of_halves(count):
    torch.manual_seed(8)
    real, generated = torch.rand(count + 3, 1, 2, 2), torch.rand(count, 1, 2, 2) ** 1.5
    found = evaluate.frechet_distance(real, generated, nn.Flatten())
    rows = [images.flatten(1).double() for images in (real, generated)]
    drawn = torch.tensor(
        [_kid(*(r[torch.randperm(len(r))[: count // 2]] for r in rows)) for _ in range(400)]
    )
    # Of 100 subsets the spread is known to some 7% and more where the kernel's tails are heavy.
    assert found.kid_spread == pytest.approx(float(drawn.std()), rel=0.4)
    assert found.kid == pytest.approx(float(drawn.mean()), abs=5 * float(drawn.std()) / 10)


def raises():
    raise RuntimeError("no such layer\nat all")


def leaves():
    raise SystemExit(3)


@pytest.mark.parametrize("function", ["raises", "leaves", "nothing", "images", "State.last"])
def test_whatever_a_function_does_is_one_line(function):
    with pytest.raises(ValueError, match="extractor='tests.evaluate.test_frechet:") as caught:
        load_extractor(f"{__name__}:{function}")
    assert "\n" not in str(caught.value)
    assert not load_extractor(f"{__name__}:batch_norm").training


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of torch-fidelity's Inception with random weights."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind, file = inception.FeatureExtractorInceptionV3, tmp_path_factory.mktemp("w") / "random.pth"
    torch.manual_seed(0)
    with mock.patch("torch.load"), mock.patch.object(kind, "load_state_dict"):
        network = kind("inception-v3-compat", ["2048"], "")
    torch.save(network.state_dict(), file)
    return file


def test_inception_with_random_weights(weights):
    network = evaluate.Inception(weights)
    assert not network.published
    # Its first features alone: the square root of a product of 2048 x 2048 takes many seconds.
    network.network.features_list = ["64"]
    found = evaluate.frechet_distance(images(3), images(3, 1, channels=3), network)
    assert found.features == 64 and math.isfinite(found.fid) and found.fid >= -1e-9
    assert not found.comparable and len(found.weights_sha256) == 64
    grey = images(1)
    assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("content", [{"a": torch.ones(2)}, None])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    pytest.importorskip("torch_fidelity")
    file = tmp_path / "weights.pth"
    torch.save(content, file) if content else file.write_text("text")
    with pytest.raises(ValueError, match="are not torch-fidelity's of Inception") as caught:
        evaluate.Inception(file)
    assert "\n" not in str(caught.value)
