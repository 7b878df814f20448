"""Two RL steps with vLLM beside the trainer, then vLLM asleep and awake again; writes JSON.

usage: rl_program.py OUTPUT.json --section.key VALUE ...
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    from dataclasses import replace

    import torch
    import torch.distributed as dist

    from mrlhf.config.load import load_config
    from mrlhf.config.options import PPOStage
    from mrlhf.config.process import prepare_environment
    from mrlhf.parallel import device, state
    from mrlhf.rl.ppo import PPO
    from mrlhf.rl.ppo_checks import check_ppo

    prepare_environment()
    config = load_config(PPOStage, None, sys.argv[2:])
    inputs = check_ppo(config, state.world_size())
    start = time.monotonic()
    ppo = PPO(config, inputs, None, began=start)
    seconds = {"start": time.monotonic() - start}
    logs = [ppo.step(step)[0] for step in (1, 2)]

    def used_gib() -> float:
        """Of the whole device, so that what torch's allocator does not see counts."""
        if not device.current().is_cuda:
            return 0.0
        torch.cuda.synchronize()
        free, size = torch.cuda.mem_get_info()
        return (size - free) / 2**30

    def greedy() -> list[list[int]]:
        rows, sampling = list(range(8)), replace(ppo.sampling, temperature=0.0)
        return [a.tokens for a in ppo.generate(inputs.train, rows, step=0, n=1, sampling=sampling).answers]

    memory, answers = {"awake": used_gib()}, [greedy()]
    start = time.monotonic()
    ppo.sampler.sleep()
    memory["asleep"], seconds["sleep"] = used_gib(), time.monotonic() - start
    start = time.monotonic()
    _, seconds["reshard"] = ppo.sampler.write_weights(ppo.models.actor.parameters())
    memory["awake again"], seconds["wake and reshard"] = used_gib(), time.monotonic() - start
    answers.append(greedy())
    if dist.get_rank() == 0:
        copied = ppo.sampler.reshard.copied
        result = {"logs": logs, "answers": answers, "memory": memory, "seconds": seconds, "copied": copied}
        Path(sys.argv[1]).write_text(json.dumps(result))
    ppo.close()


if __name__ == "__main__":
    main()
