"""Sums of parts: few and many, of several tensors in a launch, in either order, over launches."""

import pytest
import torch

from fastsfvae.kernels import _stack_sums
from fastsfvae.kernels._stack_sums import Partial, Sum, add_up
from fastsfvae.ops.partial_sums import PartialSums
from tests._triton import assert_as_good, requires_triton
from tests.kernels.stack_layers import draw

pytestmark = requires_triton

# Numbers of parts, on both sides of where the tile changes, and shapes [rows, taps, channels],
# which fill no whole number of blocks.
COUNTS = 1, 17, 65, 300
SHAPES = (5, 16, 3), (2, 1, 70)


def room_of(parts):
    """The same numbers as a launch leaves them."""
    room = Partial(parts[0].numel(), parts.device)(len(parts))
    room.parts[:, : parts[0].numel()] = parts.flatten(1)
    return room.parts


def test_against_float64(poisoned_empty):
    shapes = [(count, *shape) for count in COUNTS for shape in SHAPES]
    parts = draw(0, torch.float32, *shapes)
    rooms = [room_of(p) for p in parts]
    plain = [torch.empty_like(p[0]) for p in parts]
    turned = [torch.empty_like(p[0].mT, memory_format=torch.contiguous_format) for p in parts]
    add_up([Sum(*pair) for pair in zip(rooms, plain, strict=True)])
    orders = [p.shape[2:] for p in parts]
    add_up([Sum(r, t, *o) for r, t, o in zip(rooms, turned, orders, strict=True)])
    for p, got, other in zip(parts, plain, turned, strict=True):
        assert_as_good(got, p.double().sum(0), p.sum(0), p.double().abs().sum(0).max())
        assert torch.equal(other, got.mT)


def test_more_sums_than_one_launch_takes(monkeypatch):
    monkeypatch.setattr(_stack_sums, "_AT_A_TIME", 2)
    parts = draw(0, torch.float32, (3, 7), (200, 5), (2, 130), (1, 1), (4, 33))
    found = [torch.empty_like(p[0]) for p in parts]
    add_up([Sum(room_of(p), out) for p, out in zip(parts, found, strict=True)])
    for p, got in zip(parts, found, strict=True):
        torch.testing.assert_close(got, p.sum(0))


def test_a_launch_is_of_one_dtype_on_one_device(monkeypatch):
    launches = []
    monkeypatch.setattr(_stack_sums, "launch", lambda *args, **_: launches.append(args[3]))
    outs = [
        torch.empty(4, dtype=dtype, device=device)
        for device in ("cpu", "meta")
        for dtype in (torch.float32, torch.bfloat16, torch.float32)
    ]
    add_up([Sum(torch.empty(2, 4, device=out.device), out) for out in outs])
    alike = [{(out.dtype, out.device.type) for out in launch} for launch in launches]
    assert all(len(kinds) == 1 for kinds in alike) and sorted(map(len, launches)) == [1, 1, 2, 2]


def test_rooms_keep_what_is_in_them(poisoned_empty):
    (given,) = draw(0, torch.float32, (9, 6))
    partial = Partial(6, given.device)
    # Of fewer parts than were there, and of more.
    for first, count in ((0, 3), (3, 2), (5, 4)):
        room = partial(count)
        assert room.filled == (first > 0)
        new, own = given[first : first + count], room.parts[:, :6]
        own.copy_(own + new if room.filled else new)
    torch.testing.assert_close(partial.parts[:, :6].sum(0), given.sum(0))


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_gradients_lie_as_their_tensors(order):
    weight, bias, unwanted = draw(0, torch.float32, (5, 3, 4, 4), (7,), (2,))
    weight = weight.to(torch.bfloat16, memory_format=order)
    sums = PartialSums(lambda tensor: tensor is not unwanted)
    rooms = {tensor: sums.rooms(tensor)(2) for tensor in (weight, bias, unwanted)}
    for room in rooms.values():
        room.parts.copy_(torch.arange(room.parts.numel()).view(room.parts.shape))
    (of_weight, g_weight), (of_bias, g_bias) = sums.add_up()
    assert of_weight is weight and of_bias is bias and not sums.add_up()
    assert g_weight.dtype == torch.bfloat16 and g_weight.stride() == weight.stride()
    expected = rooms[weight].parts.sum(0).view(5, 4, 4, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(g_weight, expected.to(torch.bfloat16))
    torch.testing.assert_close(g_bias, rooms[bias].parts.sum(0)[:7])
