"""Memory of vLLM on a rank: weights, key/value cache and what it works with; and the cache that the rest leaves.

On CUDA vLLM runs its largest batch at start-up, captures CUDA graphs, and keeps both kinds of memory beside weights and
cache. The sizes here are upper bounds, read from vLLM's code, and not measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from mrlhf.config.options import OffloadConfig, PPOStage
from mrlhf.memory.estimate import layout_options, model_bytes
from mrlhf.models.families.spec import ModelSpec

BATCHED_TOKENS = 8192  # tokens of vLLM's largest batch: its max_num_batched_tokens
CPU_CACHE_MIB = 256
_GRAPHS = 1 << 30  # CUDA graphs of all batch sizes
_LIBRARIES = 512 << 20  # code of kernels, cuBLAS' workspaces; under tensor parallelism NCCL's buffers as much again
_BLOCK_TOKENS = 16  # of the cache: each answer's last block is partly empty
RESERVE = 0.05  # of a card: fragments in torch's allocator, and communicators that start later


@dataclass(frozen=True)
class VLLMMemory:
    """Bytes of one rank. work: what vLLM takes of the card besides weights and cache. free: before it starts.

    total: of the card; 0 on CPU, where vLLM works with little besides.
    """

    weights: int
    cache: int
    free: int
    work: int = 0
    libraries: int = 0
    total: int = 0

    @property
    def taken(self) -> int:
        return self.weights + self.cache + self.work + self.libraries

    @property
    def share(self) -> float:
        """vLLM's gpu_memory_utilization: it starts if this share of the card is free after its libraries' part."""
        return (self.weights + self.cache + self.work) / self.total

    def summary(self) -> str:
        weights, cache, free = (f"{x / 2**30:.2f} GiB" for x in (self.weights, self.cache, self.free))
        besides = f", {(self.work + self.libraries) / 2**30:.2f} GiB to work with" if self.total else ""
        return f"{weights} of weights{besides} and {cache} of cache on each rank, {free} were free"


def cache_bytes(spec: ModelSpec, *, dtype: str, tp: int, tokens: int) -> int:
    """Keys and values of one sequence on a rank. Layers with a sliding window keep the window."""
    heads = max(1, spec.num_query_groups // tp) if spec.latent is None else spec.num_attention_heads // tp
    token = 2 * heads * spec.qk_dim * (4 if dtype == "float32" else 2)
    return sum(token * min(tokens, layer.window or tokens) for layer in spec.layers)


def _work_bytes(spec: ModelSpec, *, dtype: str, tp: int, max_num_seqs: int) -> int:
    """The tensors of a layer on the largest batch, the sampler's on the logits of `max_num_seqs` answers, the graphs.

    The sampler: logits of this rank and of all, in fp32 as such, tempered, as log-probs and as probabilities, sorted
    with their indices.
    """
    element, tokens = 4 if dtype == "float32" else 2, max(BATCHED_TOKENS, max_num_seqs)
    attention = (2 * spec.num_attention_heads + 2 * spec.num_query_groups) * max(spec.qk_dim, spec.head_dim)
    mlp = 3 * spec.ffn_hidden_size
    if (x := spec.experts) is not None:
        mlp = max(mlp, x.top_k * (3 * x.ffn_hidden_size + 2 * spec.hidden_size * tp) + 3 * x.shared_ffn_hidden_size)
    layer = tokens * element * (4 * spec.hidden_size + (attention + mlp) // tp)
    return layer + max_num_seqs * spec.padded_vocab_size * (2 * element + 6 * 4 + 8) + _GRAPHS


def plan_vllm(spec: ModelSpec, *, dtype: str, tp: int, kv_cache_mib: int | None, max_num_seqs: int, max_model_len: int,
              free: int, room: int, total: int) -> VLLMMemory:
    """vLLM's parts on a rank; without `kv_cache_mib` the cache that they leave of a card.

    free: bytes before vLLM starts; room: without those that the trainer will take while vLLM is awake; total: of the
    card, 0 on CPU. A cache gets what is free up to what `max_num_seqs` answers of `max_model_len` tokens can use.
    """
    weights = model_bytes(spec, dtype=dtype, tp=tp, pp=1, dp=1, trained=False, distributed_optimizer=False)
    if not total:
        return VLLMMemory(weights, (kv_cache_mib or CPU_CACHE_MIB) << 20, free)
    work = _work_bytes(spec, dtype=dtype, tp=tp, max_num_seqs=max_num_seqs)
    libraries = _LIBRARIES * (2 if tp > 1 else 1)
    if kv_cache_mib is not None:
        cache = kv_cache_mib << 20
    else:
        left = room - weights - work - libraries - round(RESERVE * total)
        one = cache_bytes(spec, dtype=dtype, tp=tp, tokens=max_model_len + _BLOCK_TOKENS)
        cache = max(0, min(left, max_num_seqs * one)) >> 20 << 20
    return VLLMMemory(weights, cache, free, work, libraries, total)


def cache_on_a_card(config: PPOStage, spec: ModelSpec, *, world: int, others: dict[str, ModelSpec], tokens: int,
                    update: int, card: int) -> int:
    """The cache that `plan_vllm` would choose on a card of `card` bytes.

    others: as for `memory_table`; tokens: of the longest prompt and answer; update: activations of one.
    Colocated, the trainer's parts that `offload.*` does not name stay on the card; without rollout.sleep all may be
    there.
    """
    rollout, width = config.rollout, 4 if config.model.dtype == "float32" else 2
    offload, left = config.offload if rollout.sleep else OffloadConfig(), card - (0 if rollout.sleep else update)
    roles = {"actor": spec} | others | ({"reference": spec} if config.kl.coef > 0 else {})
    for role, model in roles.items():
        parallel = config.critic_parallel if role == "critic" else config.parallel
        sizes = {"dtype": config.model.dtype, **layout_options(config, parallel, world)}
        weights = model_bytes(model, **sizes, trained=False)
        if role in ("actor", "critic"):
            gradients = weights // width * 4
            optimizer = model_bytes(model, **sizes, trained=True) - weights - gradients
            left -= weights + gradients * (not offload.gradients) + optimizer * (not offload.optimizer)
        elif not (offload.reference if role == "reference" else offload.reward):
            left -= weights
    left = card if rollout.placement == "separate" else left
    return plan_vllm(spec, dtype=config.model.dtype, tp=rollout.tensor_parallel_size, kv_cache_mib=None,
                     max_num_seqs=rollout.max_num_seqs, max_model_len=tokens, free=left, room=left, total=card).cache
