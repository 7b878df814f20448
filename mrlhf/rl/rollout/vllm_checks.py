"""Models and tensor-parallel sizes that vLLM cannot run, or would compute wrongly; found before it is imported."""

from __future__ import annotations

from mrlhf.errors import ConfigError
from mrlhf.models.families.spec import ModelSpec
from mrlhf.parallel import device

_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def check_vllm_model(spec: ModelSpec, *, tp: int, world: int, key: str) -> list[ConfigError]:
    """Reasons why vLLM would refuse this model and tensor-parallel size `tp` (option `key`) on `world` ranks."""
    errors = []
    heads, groups, ffn = spec.num_attention_heads, spec.num_query_groups, spec.ffn_hidden_size
    shared = spec.experts.shared_ffn_hidden_size if spec.experts is not None else 0

    def fits(n: int) -> bool:
        return not (heads % n or (groups % n and n % groups) or ffn % n or shared % n)

    sizes = [n for n in range(1, heads + 1) if fits(n) and (n == 1 or spec.qk_norm != "all")]
    allowed = ", ".join(map(str, sizes))
    fix = f"--{key} {max(n for n in sizes if n == 1 or (n <= tp and world % n == 0))}"
    if world % tp:
        what = f"{key} = {tp} does not divide the {world} ranks"
        errors.append(ConfigError(what, where=key, expected="a divisor of the number of ranks", fix=fix))
    if heads % tp or (groups % tp and tp % groups) or ffn % tp:
        what = f"num_attention_heads = {heads}, num_key_value_heads = {groups}, intermediate_size = {ffn}"
        errors.append(ConfigError(f"{key} = {tp} does not fit {what}", where=key, expected=allowed, fix=fix))
    if spec.qk_norm == "all" and tp > 1:
        what = f"{key} = {tp}: vLLM's norm over all heads of {spec.family} has not been tested with sharded heads"
        errors.append(ConfigError(what, where=key, expected="1", fix=f"--{key} 1"))
    if shared % tp:
        what = f"{key} = {tp} does not divide the shared experts' intermediate size {shared}"
        errors.append(ConfigError(what, where=key, expected="a divisor", fix=fix))
    errors += _check_latent_attention(spec)
    expert_ffn = spec.experts.ffn_hidden_size // tp if spec.experts else 0
    if not device.current().is_cuda and expert_ffn % 32:
        what = f"vLLM's CPU experts pad an intermediate size of {expert_ffn} a rank and cannot be written in place"
        errors.append(ConfigError(what, where="model", expected="a multiple of 32 on each rank"))
    if not device.current().is_cuda and spec.qk_dim not in _CPU_HEAD_DIMS:
        what = f"vLLM's CPU attention has no kernel for head_dim = {spec.qk_dim}"
        errors.append(ConfigError(what, where="model", expected=", ".join(map(str, _CPU_HEAD_DIMS))))
    return errors


def _check_latent_attention(spec: ModelSpec) -> list[ConfigError]:
    """vLLM assumes the opposite of these, whatever config.json says; its answers would be another model's."""
    if spec.latent is None:
        return []
    wrong = {
        "with tied embeddings": spec.tied,
        "whose rotated dimensions are not pairs of neighbours (rope_interleave false)": not spec.ropes[0].interleaved,
        # measured: with more query than key heads its CPU kernel rotates queries by other angles than its own reference
        "with rotary positions that are not scaled, on CPU": (
            not device.current().is_cuda and spec.ropes[0].scaling == "none"
        ),
    }
    texts = [f"vLLM computes {spec.family} {what} wrongly" for what, applies in wrong.items() if applies]
    return [ConfigError(text, where="model") for text in texts]
