"""Under torchrun: two PPO steps, then greedy answers to 32 prompts from vLLM with the weights it was given in memory.

usage: ppo_program.py OUTPUT.json --section.key VALUE ...
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    from dataclasses import replace

    import torch
    import torch.distributed as dist

    from mrlhf.checkpoint.save import save
    from mrlhf.config.load import load_config
    from mrlhf.config.options import PPOStage
    from mrlhf.observe import log
    from mrlhf.parallel import state
    from mrlhf.rl.ppo import PPO, make_bridge
    from mrlhf.rl.ppo_checks import check_ppo
    from mrlhf.rl.rollout.remote import run_generator

    log.set_up()
    config = load_config(PPOStage, None, sys.argv[2:])
    inputs = check_ppo(config, state.world_size())
    bridge = make_bridge(config)
    if bridge is not None and not bridge.trains:
        return run_generator(config, inputs, bridge, began=time.monotonic())
    ppo = PPO(config, inputs, bridge, began=time.monotonic())
    logs = [ppo.step(step)[0] for step in (1, 2)]
    with torch.no_grad():  # a sampler that is not the trained policy must show
        ppo.sampler.write_weights({name: parameter * 1.2 for name, parameter in ppo.models.actor.parameters().items()})
    logs.append(ppo.step(3)[0])
    ppo.offload.park_all()
    parked = [kind for role in ppo.offload.parked.values() for parking, _, kind in role if parking.is_away]
    rollout = ppo.generate(inputs.train, list(range(32)), step=0, n=1, sampling=replace(ppo.sampling, temperature=0.0))
    content = {"stage": "ppo", "step": 2, "dtype": config.model.dtype}
    save(Path(config.train.output_dir), ppo.models.parts(with_optimizer=False), content)
    if dist.get_rank() == 0:
        answers = [a.tokens for a in rollout.answers]
        Path(sys.argv[1]).write_text(
            json.dumps(
                {
                    "logs": logs,
                    "prompts": rollout.prompts,
                    "answers": answers,
                    "received": ppo.sampler.reshard.received,
                    "parked": parked,
                }
            )
        )
    ppo.sampler.shutdown()
    state.shutdown()


if __name__ == "__main__":
    main()
