"""What mrlhf changes in Megatron computes what Megatron computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mrlhf.parallel import megatron

# isort: split
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel.schedules import get_schedule_table


def test_the_norm_on_the_device_is_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding; and no number comes to the host on the way."""
    monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for shape in ((5, 7), (3,), (1,))]
    theirs, _ = clip_grads.l2_norm_impl(0, None, [grads], False)
    scaled = [g.clone() for g in grads]
    clip_grads.multi_tensor_scale_impl(0, None, [scaled, scaled], 0.25)
    megatron.norm_on_device()
    with monkeypatch.context() as patch:
        for read in ("item", "tolist", "__float__"):
            patch.setattr(torch.Tensor, read, None)
        ours, _ = clip_grads.l2_norm_impl(0, None, [grads], False)
        clip_grads.multi_tensor_scale_impl(0, None, [grads, grads], 0.25)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(grads, scaled, strict=True))


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("rank", range(3))
def test_shapes_come_in_the_order_of_the_schedule(rank: int, chunks: int) -> None:
    """Of three stages: the first receives nothing for its first chunk, the last no gradient for its last one."""
    group = SimpleNamespace(rank=lambda: rank, size=lambda: 3)
    config = SimpleNamespace(virtual_pipeline_model_parallel_size=chunks, microbatch_group_size_per_vp_stage=3)
    communicator, shapes = SimpleNamespace(pp_group=group, config=config), [(n, 1, 8) for n in range(6)]
    order = get_schedule_table(6, chunks, 3)
    megatron.know_shapes(communicator, shapes)
    receive = communicator._communicate_shapes
    forward = [shapes[n] for n, chunk in order if (rank, chunk) != (0, 0)]
    backward = [shapes[n] for n, chunk in order if (rank, chunks - 1 - chunk) != (2, chunks - 1)]
    assert [receive(None, None, True, False)[0] for _ in forward] == forward
    assert [receive(None, None, False, True)[1] for _ in backward] == backward
    for direction in ((True, False), (False, True)):
        with pytest.raises(StopIteration):
            receive(None, None, *direction)
