"""States that come back to the bit, in a file that any reader of safetensors understands."""

import json
import math
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fastsfvae.training.state_file import pack, unpack

DTYPES = "float64 float32 float16 bfloat16 complex64 complex128 int64 int32 int16 int8 uint64 "
DTYPES += "uint32 uint16 uint8 bool"


def _round_trip(state):
    return unpack(b"".join(pack(state, "a format")), "a format")


def _assert_same(one, other):
    """The same types, values and bits, all the way down."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        # By bytes: NaNs differ from themselves, and carry bits of their own.
        assert one.contiguous().numpy(force=True).tobytes() == other.numpy().tobytes()
    elif isinstance(one, dict):
        assert getattr(one, "_metadata", None) == getattr(other, "_metadata", None)
        assert [*map(repr, one)] == [*map(repr, other)]
        for pair in zip(one.values(), other.values(), strict=True):
            _assert_same(*pair)
    elif isinstance(one, (list, tuple)):
        for pair in zip(one, other, strict=True):
            _assert_same(*pair)
    else:
        # repr tells -0.0 from 0.0, and NaN equals NaN.
        assert repr(one) == repr(other)


@pytest.mark.parametrize("dtype", DTYPES.split())
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 7)], ids=str)
def test_tensors_of_all_kinds(dtype, shape):
    dtype = getattr(torch, dtype)
    count = math.prod(shape) * dtype.itemsize
    bits = torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator())
    if dtype is torch.bool:
        bits %= 2
    tensor = bits.view(dtype).reshape(shape)
    state = _round_trip({"a": tensor})["a"]
    assert (state.dtype, state.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(state.reshape(-1).view(torch.uint8), bits)


def test_numbers_and_containers():
    ordered = OrderedDict([("0.weight", torch.ones(2))])
    ordered._metadata = OrderedDict([("", {"version": 2})])
    state = {
        "numbers": [math.nan, math.inf, -math.inf, -0.0, 0.1, 5e-324, 2**200, -(2**63), True, None],
        "texts": ["", 'a "quoted" \\ "sha256":"0', "\0\n\N{SNOWMAN}", "\ud800"],
        "keys": {0: "0", "0": 0, (1, "a"): (), 2.5: [], True: {}, None: ({},)},
        "module": ordered,
        "empty": OrderedDict(),
        "tensor": {"tensor": "a", "dict": [], "tuple": torch.tensor(math.nan)},
    }
    _assert_same(state, _round_trip(state))


def test_views_and_tied_weights():
    weight = torch.arange(12.0).reshape(3, 4)
    tied = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    tied["b"].weight = tied["a"].weight
    state = {
        "transposed": weight.mT,
        "step": weight[:, 1],
        "expanded": weight[:1].expand(5, 4),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "tied": tied.state_dict(),
    }
    found = _round_trip(state)
    for name in ("transposed", "step", "expanded", "conjugate", "negative"):
        assert torch.equal(found[name], state[name])
    _assert_same(state["tied"], found["tied"])


def test_optimizers():
    """Whole numbers as keys, tuples of settings, moments and steps."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters(), amsgrad=True)
    layer(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    _assert_same(optimizer.state_dict(), _round_trip(optimizer.state_dict()))


def test_what_a_file_cannot_hold_is_named():
    wrong = {
        "a set": ({"b": {"a": {1}}}, "b.a is a set, which"),
        "a sparse tensor": ({"a": torch.eye(2).to_sparse()}, "a is a Tensor, which"),
        "a dtype": ({"a": torch.ones(2).to(torch.float8_e5m2)}, "a is of torch.float8_e5m2, which"),
        "an object": ({"a": [0, torch.Size([1])]}, "a.1 is a Size, which"),
    }
    for state, message in wrong.values():
        with pytest.raises(TypeError, match=f"^{message} a checkpoint cannot hold: it takes dense"):
            pack(state, "a format")
    with pytest.raises(ValueError, match="two tensors are named a.b: rename"):
        pack({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "a format")


def test_other_tools_see_the_tensors_by_their_names(tmp_path):
    path = tmp_path / "a.safetensors"
    weight = torch.rand(2, 3)
    path.write_bytes(b"".join(pack({"encoder": {"0.weight": weight}, "step": 3}, "a format")))
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("encoder.0.weight"), weight)
        assert [*file.keys()] == ["encoder.0.weight"]
        metadata = file.metadata()
    assert metadata["format"] == "a format" and len(metadata["sha256"]) == 64
    assert "encoder.0.weight" in json.dumps(json.loads(metadata["state"]))


def test_without_safetensors_one_line_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['safetensors'] = None; sys.modules['safetensors.torch'] = None\n"
        "from fastsfvae import training\n"
        "from fastsfvae.training.config import TrainConfig\n"
        "training.start(TrainConfig('sampling', model='linear', steps=1), sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: checkpoints need safetensors: pip install 'fastsfvae[train]'"
    )
    assert not (tmp_path / "run").exists()
