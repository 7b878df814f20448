"""The ranks of every process group are those of Megatron's own initialisation."""

from __future__ import annotations

import pytest

from mrlhf.config.options import ParallelConfig
from mrlhf.parallel.state import Layout, expert_tensor_parallel_size, group_ranks

# isort: split
from megatron.core.parallel_state import RankGenerator, default_embedding_ranks

ORDER = "tp-cp-ep-dp-pp"  # initialize_model_parallel's default
DENSE = {
    "tp": "tp",
    "cp": "cp",
    "pp": "pp",
    "dp": "dp",
    "dp_cp": "dp-cp",
    "mp": "tp-pp",
    "tp_cp": "tp-cp",
    "tp_dp_cp": "tp-dp-cp",
}
EXPERTS = {"ep": "ep", "expt_tp": "tp", "expt_dp": "dp", "tp_ep": "tp-ep", "tp_ep_pp": "tp-ep-pp"}


def as_sets(groups: list[list[int]]) -> set[frozenset[int]]:
    return {frozenset(ranks) for ranks in groups}


@pytest.mark.parametrize(
    ("world", "tp", "cp", "pp", "ep"),
    [
        (world, tp, cp, pp, ep)
        for world in (1, 2, 4, 8, 16, 48)
        for tp, cp, pp in (
            (1, 1, 1),
            (2, 1, 1),
            (1, 2, 1),
            (1, 1, 2),
            (2, 2, 1),
            (2, 1, 2),
            (2, 2, 2),
            (1, 1, 4),
            (4, 1, 2),
        )
        for ep in (1, 2, 4)
        if world % (tp * cp * pp) == 0 and world // pp % ep == 0
    ],
)
def test_groups_are_megatrons(world: int, tp: int, cp: int, pp: int, ep: int) -> None:
    config = ParallelConfig(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )
    layout, expert_tp = Layout.from_config(config, world), expert_tensor_parallel_size(config)
    ours = group_ranks(layout, expert_tp)
    dense = RankGenerator(tp=tp, ep=1, dp=layout.dp, pp=pp, cp=cp, order=ORDER)
    experts = RankGenerator(tp=expert_tp, ep=ep, dp=world // (expert_tp * ep * pp), pp=pp, cp=1, order=ORDER)
    for names, generator in ((DENSE, dense), (EXPERTS, experts)):
        for name, token in names.items():
            assert as_sets(ours[name]) == as_sets(generator.get_ranks(token)), name
    assert ours["intra_dist_opt"] == [list(range(world))]
    ends = [default_embedding_ranks(ranks) for ranks in dense.get_ranks("pp")]
    assert as_sets(ours["embd"]) == (as_sets(ends) if pp > 1 else set())
    for rank in range(world):
        place = layout.coordinates(rank)
        assert place == tuple(
            next(ranks.index(rank) for ranks in ours[name] if rank in ranks) for name in ("tp", "dp", "pp")
        )
