"""Numbers that a step reads are filled once, and never where somebody else owns what is made."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsfvae import _constants

CPU = torch.device("cpu")


def test_one_tensor_for_equal_numbers():
    first = _constants.full((2,), 0.25, torch.float32, CPU)
    assert torch.equal(first, torch.tensor([0.25, 0.25])) and first.dtype == torch.float32
    assert _constants.full((2,), 0.25, torch.float32, CPU) is first
    others = [
        _constants.full((3,), 0.25, torch.float32, CPU),
        _constants.full((2,), 0.5, torch.float32, CPU),
        _constants.full((2,), 0.25, torch.float64, CPU),
    ]
    assert all(other is not first for other in others)
    assert others[2].dtype == torch.float64 and others[1].tolist() == [0.5, 0.5]
    assert torch.equal(_constants.eye(3, torch.float32, CPU), torch.eye(3))


def test_none_is_kept_inside_of_a_mode_or_a_transform():
    def made():
        return _constants.full((5,), 0.125, torch.float32, CPU)

    kept = made()
    with FakeTensorMode():
        assert made() is not kept
    with torch.inference_mode():
        assert made() is not kept
    inside = []
    torch.func.vmap(lambda x: (inside.append(made()), x)[1])(torch.ones(2))
    assert inside[0] is not kept
    assert made() is kept


def test_their_number_has_a_bound(monkeypatch):
    monkeypatch.setattr(_constants, "_kept", {})
    monkeypatch.setattr(_constants, "_MOST", 2)
    made = [_constants.full((), float(i), torch.float32, CPU) for i in range(4)]
    again = [_constants.full((), float(i), torch.float32, CPU) for i in range(4)]
    assert [a is b for a, b in zip(made, again, strict=True)] == [True, True, False, False]
    assert [float(t) for t in again] == [0, 1, 2, 3]
