"""A cheaper sampler for vLLM on CPU: a rollout needs a seed per request, and log-probs of sampled tokens only.

Tokens and log-probs equal those of vLLM's own sampler.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch

_NUMBERS_PER_DRAW = 64  # from a request's generator; vLLM draws one number for each token, by a call of its own


def install_cpu_sampler() -> None:
    """Replaces vLLM's sampling functions in this process."""
    import vllm.v1.sample.ops.topk_topp_sampler as module
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.sample.sampler import Sampler

    drawn: weakref.WeakKeyDictionary[torch.Generator, Iterator[int]] = weakref.WeakKeyDictionary()

    def next_number(generator: torch.Generator) -> int:
        number = next(drawn.get(generator, iter(())), None)
        if number is None:
            drawn[generator] = iter(torch.randint(0, 2**31, (_NUMBERS_PER_DRAW,), generator=generator).tolist())
            number = next(drawn[generator])
        return number

    def forward(self: Any, logits: torch.Tensor, generators: dict[int, torch.Generator], k: torch.Tensor | None,
                p: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [requests, V] -> (tokens [requests], log-probs [requests, V] after top-k and top-p)."""
        assert self.logprobs_mode == "processed_logprobs"
        logits = module.apply_top_k_top_p(logits, k, p)
        numbers = torch.randint(0, 2**31, (len(logits),)).tolist()
        for i, generator in generators.items():
            numbers[i] = next_number(generator)
        tokens = torch.ops._C.fused_gumbel_argmax(logits.float(), torch.tensor(numbers))
        return tokens, logits.log_softmax(dim=-1, dtype=torch.float32)

    gather = Sampler.gather_logprobs

    def gather_sampled(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
        """Skips the tokens' ranks, for which vLLM compares the whole vocabulary, if only sampled tokens are wanted."""
        if num_logprobs:
            return gather(logprobs, num_logprobs, token_ids)
        ids = token_ids.unsqueeze(-1)
        return LogprobsTensors(ids.int(), logprobs.gather(-1, ids), torch.zeros(len(ids), dtype=torch.long))

    module.TopKTopPSampler.forward_cpu = forward
    Sampler.gather_logprobs = staticmethod(gather_sampled)
