"""What every rehearsed case must satisfy."""

from __future__ import annotations

from typing import Any

from cuda.cases import Case

# Where the host may wait for the device. None is once a layer, but for experts, whose token counts the host must know.
ONCE_A_STEP = {
    "megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32": "the gradient norm",
    "mrlhf/training/trainer.py:_reduce": "the metrics",
    "mrlhf/models/layers/router_losses.py:_summed": "the routers' losses",
}
ONCE_A_LAYER_OF_EXPERTS = {
    "megatron/core/transformer/moe/token_dispatcher.py:_maybe_dtoh_and_synchronize": "how many tokens an expert takes",
}
ONCE_A_MICRO_BATCH = {
    "mrlhf/models/layers/logprobs.py:head_logprobs": "how many tokens the head takes",
}
RESULTS = {
    "mrlhf/training/trainer.py:score_micro_batches": "scores for the host",
    "mrlhf/dpo.py:_logps_of": "the reference's log-probs for the host",
    "mrlhf/rl/rollout/tables.py:compute_tables": "tables for the host",
    "mrlhf/parallel/state.py:sum_over_data_parallel": "tables of all ranks for the host",
    "mrlhf/parallel/reshard.py:exchange": "the end of an exchange is timed",
    "mrlhf/checkpoint/save.py:_plan_writes": "what is saved",
    "mrlhf/parallel/offload.py:park": "the copies to the host, before their memory is given back",
}
KNOWN_WAITS = ONCE_A_STEP | ONCE_A_LAYER_OF_EXPERTS | ONCE_A_MICRO_BATCH | RESULTS


def assert_clean(case: Case, outcome: dict[str, Any]) -> None:
    assert not outcome["errors"], "\n".join(outcome["errors"])
    unknown = {place: n for place, n in outcome["waits"].items() if place not in KNOWN_WAITS}
    assert not unknown, f"the host waits for the device at {unknown}"
    assert not outcome["squares"], f"square in the row length: {outcome['squares'][:5]}"
    assert not outcome["unpaired"], "\n".join(outcome["unpaired"])
    assert outcome["peak"] > 0
