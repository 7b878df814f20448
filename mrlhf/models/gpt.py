"""ModelSpec -> megatron-core GPTModel, and its weights from HF files or from a seed.

The model is built empty. `fill` then sets its parameters slice by slice through the weight map, so the values depend on
no parallel layout.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset as layer_offset
from megatron.core.transformer.utils import make_tp_sharded_tensor_for_checkpoint
from megatron.core.utils import get_attr_wrapped_model

from mrlhf.config.options import ParallelConfig
from mrlhf.data.loader import MicroBatch
from mrlhf.models.families import hf_tensors, megatron_map
from mrlhf.models.families.rope_frequencies import inverse_frequencies
from mrlhf.models.families.slices import TensorSlice
from mrlhf.models.families.spec import ModelSpec
from mrlhf.models.layer_spec import layer_spec
from mrlhf.models.layers.attention import RotaryTable, Segments
from mrlhf.models.layers.logprobs import Head
from mrlhf.models.layers.norms import Norm
from mrlhf.parallel import device, megatron, state
from mrlhf.parallel.context import sum_over_ranks

_OPTIMIZER_FORMAT = "fully_reshardable"
CHECKPOINT_CONTENT = {"distrib_optim_sharding_type": _OPTIMIZER_FORMAT}  # Megatron stores it in a checkpoint
_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


class ValueHead(torch.nn.Linear):
    """Hidden states [s, b, h] (a slice of s under sequence parallelism) -> values [s, b, 1] in fp32, whole on every
    rank.

    group: tensor-parallel. Without sequence parallelism all its ranks have the same input and gradient. With it each
    rank has the gradient of its own tokens, and the mark on the weight makes `finalize_model_grads` sum them.
    """

    def __init__(self, config, group: dist.ProcessGroup) -> None:
        super().__init__(config.hidden_size, 1, bias=False, dtype=config.params_dtype)
        self.sequence_parallel, self.group = config.sequence_parallel, group
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBH, weight=None, runtime_gather_output=None):
        values_SB1 = F.linear(hidden_SBH.float(), self.weight.float())  # bf16 would round a value of 4 to steps of 1/32
        if self.sequence_parallel:
            options = {"tensor_parallel_output_grad": False, "group": self.group}
            values_SB1 = gather_from_sequence_parallel_region(values_SB1, **options)
        return values_SB1, None

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.pop(prefix + "_extra_state", None)  # Megatron's output layer writes one
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def transformer_config(spec: ModelSpec, parallel: ParallelConfig, *, dtype: torch.dtype) -> TransformerConfig:
    """Fusions that need TE, apex or a compiler are off; losses are sums, which Megatron divides by the step's count."""
    ep = parallel.expert_model_parallel_size
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        normalization="LayerNorm" if spec.norm == "layer" else "RMSNorm",
        layernorm_zero_centered_gamma=spec.norm == "rms_plus_one",
        layernorm_epsilon=spec.norm_eps,
        gated_linear_unit=spec.gated,
        activation_func=_ACTIVATIONS[spec.activation],
        add_bias_linear=spec.mlp_bias,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm == "head",  # Megatron sums these norms' gradients over TP
        softmax_scale=spec.attention_scale,
        rotary_interleaved=any(rope.interleaved for rope in spec.ropes),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.interleaved_chunks,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        # batched messages cross if a rank's next and previous stage are the same rank (PP 2)
        overlap_p2p_comm=parallel.interleaved_chunks is not None,
        batch_p2p_comm=parallel.interleaved_chunks is None,
        context_parallel_size=parallel.context_parallel_size,
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        recompute_method="uniform" if parallel.recompute == "full" else None,
        recompute_num_layers=1 if parallel.recompute == "full" else None,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable_seq_lengths
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not device.current().is_cuda,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **_expert_config(spec, ep, state.expert_tensor_parallel_size(parallel)),
    )


def _expert_config(spec: ModelSpec, ep: int, etp: int) -> dict[str, Any]:
    if spec.experts is None:
        return {}
    kinds = {layer.moe for layer in spec.layers}
    return {
        "num_moe_experts": spec.experts.num,
        "moe_ffn_hidden_size": spec.experts.ffn_hidden_size,
        "moe_router_topk": spec.experts.top_k,
        "moe_shared_expert_intermediate_size": spec.experts.shared_ffn_hidden_size or None,
        "moe_router_pre_softmax": True,  # Megatron insists for top-1; layers/router.py does not read it
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_layer_freq": 1 if kinds == {True} else [int(layer.moe) for layer in spec.layers],
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }


class GPT(GPTModel):
    """Megatron's GPTModel. With an LM head its last stage returns hidden states [B, T, H], whole on every
    tensor-parallel rank.

    The loss applies the head itself, in chunks (models/layers/logprobs.py), so logits [T, V] are never whole.
    """

    def tie_embeddings_and_output_weights_state_dict(self, state_dict: dict[str, Any], output_layer_weight_key: str,
                                                     first_stage_word_emb_key: str, metadata: dict) -> None:
        """As GPTModel's, which takes the data-parallel rank of the copy from Megatron's globals."""
        if self.post_process and not self.pre_process:
            dp_cp = metadata["dp_cp_group"]
            del state_dict[output_layer_weight_key]  # its successor comes last, as with GPTModel
            state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
                self.shared_embedding_or_output_weight(), first_stage_word_emb_key, replica_id=(1, 0, dp_cp.rank()),
                allow_shape_mismatch=True, tp_group=self.tp_group, dp_cp_group=dp_cp,
            )


def _whole_hidden_states(hidden_SBH: torch.Tensor, *, config: TransformerConfig, tp: dist.ProcessGroup) -> torch.Tensor:
    if config.sequence_parallel:  # the head's gradient is whole on every rank: backward takes this rank's tokens
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False, group=tp)
    return hidden_SBH.transpose(0, 1).contiguous()


def lm_head(model: GPTModel, spec: ModelSpec) -> Head:
    """The head of the last pipeline stage. Its weight stays where Megatron has it."""
    tied = model.share_embeddings_and_output_weights
    weight_WH = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return Head(weight_WH, spec.vocab_size, model.pg_collection.tp, spec.logit_scale, spec.logit_softcap)


def build_model(spec: ModelSpec, config: TransformerConfig, *, head: str, vp_stage: int | None = None,
                groups: state.Groups | None = None) -> GPTModel:
    """This rank's part of the model, or its part number `vp_stage` in an interleaved pipeline, not yet filled.

    head: "lm" (hidden states come out, see `GPT`) or "value". groups: the run's own by default.
    """
    collection = (groups or state.groups()).collection
    stage, last_piece = collection.pp.rank(), (config.virtual_pipeline_model_parallel_size or 1) - 1
    offset, count = layer_offset(config, vp_stage, stage), get_num_layers_to_build(config, vp_stage, stage)
    layers = [layer_spec(spec, config, layer, collection) for layer in spec.layers[offset : offset + count]]
    is_last = stage == collection.pp.size() - 1 and vp_stage in (None, last_piece)
    model = GPT(
        config, TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm), vocab_size=spec.padded_vocab_size,
        max_sequence_length=spec.max_position_embeddings, pre_process=stage == 0 and not vp_stage, post_process=is_last,
        parallel_output=True, share_embeddings_and_output_weights=spec.tied and head == "lm",
        position_embedding_type="learned_absolute" if spec.learned_positions else "rope" if spec.ropes else "none",
        pg_collection=collection, vp_stage=vp_stage,
    )
    if spec.ropes:
        frequencies = torch.stack([inverse_frequencies(rope, spec.rope_dim) for rope in spec.ropes])
        model.rotary_pos_emb = RotaryTable(frequencies.to(device.current().name), interleaved=spec.ropes[0].interleaved)
    if is_last and head == "value":
        model.output_layer = ValueHead(config, collection.tp)
    elif is_last:
        megatron.replace_output(model, functools.partial(_whole_hidden_states, config=config, tp=collection.tp))
    _add_embedding_scale(model, spec)
    _mark_sharded(model)
    if spec.learned_positions and hasattr(model, "embedding"):
        model.embedding.position_embeddings.to(config.params_dtype)  # Megatron makes it in fp32
    return model.to(device.current().name)


def _add_embedding_scale(model: GPTModel, spec: ModelSpec) -> None:
    """Multiplies the embedding's output; Megatron has no option for it."""

    def scale(module, args, out: torch.Tensor) -> torch.Tensor:
        # the factor is rounded to the dtype, as in transformers
        return out * torch.tensor(spec.embedding_scale, dtype=out.dtype, device=out.device)

    if model.pre_process and spec.embedding_scale != 1.0:
        model.embedding.register_forward_hook(scale)


def _mark_sharded(model: GPTModel) -> None:
    """Sets attributes that the gradient norm reads; Megatron sets them only when it initialises values."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear):
            dim, parameters = 0, [module.weight, module.bias]
        elif isinstance(module, (VocabParallelEmbedding, RowParallelLinear)):
            dim, parameters = int(isinstance(module, RowParallelLinear)), [module.weight]
        else:
            continue
        for parameter in parameters:
            if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


class WeightSource(Protocol):
    """Gives the values of slices of HF tensors."""

    def read(self, block: TensorSlice) -> torch.Tensor: ...


class RandomSource:
    """New weights: N(0, std), std / sqrt(2 layers) for projections into the residual, neutral norms, zeros for biases.

    Each HF tensor has a generator of its own, seeded by the seed and its name, so every layout gets the same values.
    The value head is N(0, 1 / (h + 1)).
    """

    def __init__(self, spec: ModelSpec, *, head: str, seed: int) -> None:
        self.spec, self.seed, self.tensors = spec, seed, hf_tensors(spec, head=head)
        self._last: tuple[str, torch.Tensor] | None = None

    def _tensor(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            tensor = self.tensors[name]
            if tensor.kind in ("bias", "choice"):
                value = torch.zeros(tensor.shape)
            elif tensor.kind == "norm":
                value = torch.full(tensor.shape, 0.0 if self.spec.norm == "rms_plus_one" else 1.0)
            else:
                digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                std = self.spec.init_std
                if tensor.kind == "score":
                    std = 1 / math.sqrt(self.spec.hidden_size + 1)
                elif tensor.kind == "out":
                    std /= math.sqrt(2 * self.spec.num_layers)
                value = torch.randn(tensor.shape, generator=generator) * std
            self._last = (name, value)
        return self._last[1]

    def read(self, block: TensorSlice) -> torch.Tensor:
        return self._tensor(block.hf).narrow(block.dim, block.start, block.length)


def local_parameters(model: GPTModel) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """(name with the global indices of layer and expert, parameter) of this rank."""
    first_layer, experts = model.decoder.layers[0].layer_number - 1, re.compile(r"\.local_experts\.(\d+)\.")
    ep = model.pg_collection.ep
    first_expert = ep.rank() * (model.config.num_moe_experts or 0) // ep.size()
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            index, rest = name[len("decoder.layers.") :].split(".", 1)
            rest = experts.sub(lambda match: f".local_experts.{int(match[1]) + first_expert}.", rest)
            name = f"decoder.layers.{int(index) + first_layer}.{rest}"
        yield name, parameter


def local_blocks(
    model: GPTModel, spec: ModelSpec, *, head: str
) -> Iterable[tuple[str, torch.nn.Parameter, list[TensorSlice]]]:
    """(name, parameter, its slices of HF tensors) of this rank."""
    tp, ep = model.pg_collection.tp, model.pg_collection.ep
    blocks = megatron_map(spec, head=head, tp=tp.size(), rank=tp.rank(), ep=ep.size(), ep_rank=ep.rank())
    for name, parameter in local_parameters(model):
        yield name, parameter, blocks[name]


@torch.no_grad()
def fill(model: GPTModel, spec: ModelSpec, source: WeightSource, *, head: str, only: str = "") -> None:
    """Sets parameters (those whose name starts with `only`) from `source`; vocabulary padding becomes 0."""
    for name, parameter, blocks in local_blocks(model, spec, head=head):
        if name.startswith(only):
            parameter.zero_()
            for b in blocks:
                parameter.narrow(b.dim, b.offset, b.length).copy_(source.read(b))


def local_part(batch: MicroBatch, cp: dist.ProcessGroup) -> MicroBatch:
    """This context-parallel rank's tokens of a micro-batch; the batch itself without context parallelism."""
    size, rank = cp.size(), cp.rank()
    if size == 1:
        return batch
    width = batch.tokens_BT.size(1)
    assert width % size == 0, (width, size)
    part = width // size
    first = rank * part
    row_N, place_N = batch.last_N // width, batch.last_N % width - first
    per_token = {name: x for name, x in vars(batch).items() if name.endswith("_BT") and x is not None}
    return replace(batch, **{name: x_BT[:, first : first + part].contiguous() for name, x_BT in per_token.items()},
                   last_N=torch.where((place_N >= 0) & (place_N < part), row_N * part + place_N, -1), first=first,
                   over_ranks=functools.partial(sum_over_ranks, group=cp))


def forward(model: torch.nn.Module, batch: MicroBatch, *, noise: Callable[[], torch.Tensor] | None = None,
            samples_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Forward of one micro-batch: hidden states [B, T, H] or values [B, T, 1] on the last stage, [T, B, H] (or its
    slice) elsewhere.

    noise: gives what is added to the embeddings, [B, T, H] of the whole rows where context parallelism cuts them.
    samples_BT: each token's sample, for the routers' auxiliary losses (layers/router_losses.py); None: without these
    losses.
    """
    tokens_BT, positions_BT = batch.tokens_BT, batch.positions_BT
    mine = slice(batch.first, batch.first + tokens_BT.size(1))  # this rank's tokens of the rows
    in_row_s = torch.arange(mine.start, mine.stop, device=tokens_BT.device)
    segments = Segments(cu_seqlens_q=batch.cu_seqlens, max_seqlen_q=batch.max_seqlen, bounds=batch.bounds,
                        positions_s=positions_BT[0] if tokens_BT.size(0) == 1 else in_row_s)
    embedded = None
    inner = get_attr_wrapped_model(model, "pre_process", return_model_obj=True)
    if inner.pre_process:
        # Called here because of the noise, and because GPTModel would cut `padding_mask` by Megatron's globals.
        embedded = inner.embedding(input_ids=tokens_BT, position_ids=positions_BT)
        if noise is not None:
            added = noise()[:, mine].transpose(0, 1)
            if inner.config.sequence_parallel:
                added = added.chunk(inner.tp_group.size())[inner.tp_group.rank()]
            embedded = embedded + added.to(embedded.dtype)
    options = {"decoder_input": embedded, "packed_seq_params": segments, "padding_mask": samples_BT}
    return model(tokens_BT, positions_BT, None, **options)


def sharding_metadata(model: Any) -> dict[str, Any]:
    # one name for a tensor, however many optimizers this rank has: with experts over ranks Megatron has two
    return {"distrib_optim_sharding_type": _OPTIMIZER_FORMAT, "chained_optim_avoid_prefix": True,
            "dp_cp_group": model.pg_collection.dp_cp}


def sharded_state(models: list[Any]) -> dict[str, Any]:
    """The state of this rank's model chunks (several in an interleaved pipeline), by the chunk's name.

    The names on disk do not contain the chunk's name, so a model with any number of chunks can load the state.
    """
    names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    named = zip(names, models, strict=True)
    return {name: model.sharded_state_dict(metadata=sharding_metadata(model)) for name, model in named}
