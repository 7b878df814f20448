"""A real reward server and PPO: the same scores as a local model, a server that is killed in mid-step,
and the same command again.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import ROOT, environment, metrics, mrlhf


class Server:
    """`mrlhf serve-reward` in a process of its own."""

    def __init__(self, checkpoint: Path, *, port: int = 0) -> None:
        command = [
            sys.executable,
            "-m",
            "mrlhf",
            "serve-reward",
            "--checkpoint",
            checkpoint,
            "--port",
            port,
        ]
        self.process = subprocess.Popen(
            [*map(str, command), "--token_env", "REWARD_TOKEN"], cwd=ROOT,
            env={**environment(), "REWARD_TOKEN": "abc"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if found := re.search(r"serving .* at (http://127\.0\.0\.1:(\d+)/score), token needed", line):
                self.url, self.port = found[1], int(found[2])
                return
        raise AssertionError("".join(lines))

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def reward_model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rm")
    mrlhf("rm", "--model.path", world / "qwen2", "--model.dtype", "float32", "--data.train", world / "pref",
          "--train.output_dir", out, "--train.global_batch_size", 4, "--optim.lr", 1e-3)  # fmt: skip
    return out


def ask(server: Server, **columns: list) -> list[float]:
    answer = httpx.post(server.url, json=columns, headers={"Authorization": "Bearer abc"}, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["scores"]


def test_server_against_mrlhf_score_then_ppo_through_its_death(
    world: Path, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "abc")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mrlhf(
        "score",
        "--checkpoint",
        reward_model,
        "--data",
        world / "pref",
        "--output",
        tmp_path / "scores.jsonl",
    )
    wanted = [json.loads(line)["chosen"]["normalized"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    server = Server(reward_model)

    # ids, and the texts that they are: the same scores as the command has written
    from mrlhf.data.indexed import PackedDataset
    from mrlhf.data.tokenizers.hf import fingerprint, load_tokenizer

    data, tokenizer = PackedDataset.open(world / "pref"), load_tokenizer(world / "qwen2")
    chosen = [data.sample(2 * i) for i in range(len(wanted))]
    prompts = [tokens[mask == 0].tolist() for _, tokens, mask in chosen]
    answers = [tokens[mask == 1].tolist() for _, tokens, mask in chosen]
    texts = [tokenizer.decode(p) for p in prompts]
    for ending in (False, True):
        shown = [tokenizer.decode(a, skip_special_tokens=not ending) for a in answers]
        for more in ({}, {"prompt_ids": prompts, "completion_ids": answers, "tokenizer": fingerprint(world / "qwen2")}):
            assert ask(server, prompts=texts, completions=shown, **more) == pytest.approx(wanted, abs=1e-5)
    assert httpx.post(server.url, json={}, trust_env=False).status_code == 401

    # PPO scores with the model itself and through the server; the server dies in mid-run
    options = {
        "model.path": world / "qwen2", "model.dtype": "float32", "data.train": world / "prompts",
        "train.global_batch_size": 4, "train.max_steps": 3, "rollout.batch_size": 4, "rollout.max_new_tokens": 8,
        "rollout.kv_cache_mib": 64, "ppo.estimator": "reinforce", "kl.coef": 0,
        "reward.sources": f"model:{reward_model},{server.url}", "reward.weights": "1,0.5",
        "reward.http_token_env": "REWARD_TOKEN", "reward.http_retries": 2, "reward.http_timeout_s": 5,
        "checkpoint.save_interval": 1, "train.output_dir": tmp_path / "run",
    }  # fmt: skip
    command = [part for key, value in options.items() for part in (f"--{key}", value)]

    listening: set[str] = set()  # where the server and the run with its vLLM can be reached

    def kill_after_the_first_step() -> None:
        while not (tmp_path / "run/checkpoints/latest").is_file():
            time.sleep(0.02)
        for process in (psutil.Process(server.process.pid), *psutil.Process().children(recursive=True)):
            listening.update(c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN)
        server.end(signal.SIGKILL)

    killer = threading.Thread(target=kill_after_the_first_step)
    killer.start()
    began = time.monotonic()
    done = mrlhf("ppo", *command, check=False)
    killer.join()
    assert done.returncode == 2 and time.monotonic() - began < 120
    assert f"reward source '{server.url}' failed" in done.stderr and "try 3: ConnectError" in done.stderr, done.stderr
    assert len(metrics(tmp_path / "run")) < 3
    assert listening == {"127.0.0.1"}

    again = Server(reward_model, port=server.port)
    done = mrlhf("ppo", *command)
    assert "resumed from" in done.stdout
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        local, remote = (
            next(v for k, v in line.items() if k.startswith(f"reward/{kind}:")) for kind in ("model", "http")
        )
        assert remote == pytest.approx(local, abs=1e-5) and line["critic/score/mean"] == pytest.approx(
            1.5 * local, abs=1e-5
        )
    assert "abc" not in (tmp_path / "run/env.json").read_text() + (tmp_path / "run/config.yaml").read_text()
    assert again.end(signal.SIGTERM) == 0, "an orderly end"


def test_other_machines_need_a_token(reward_model: Path, world: Path) -> None:
    from mrlhf.commands.serve_reward import check_server
    from mrlhf.config.options import ServeRewardStage
    from mrlhf.errors import MrlhfError

    for host in ("0.0.0.0", "::", "10.0.0.1"):
        with pytest.raises(MrlhfError, match="there is no token"):
            check_server(ServeRewardStage(str(reward_model), host=host), 1)
    check_server(ServeRewardStage(str(reward_model)), 1)
    with pytest.raises(MrlhfError, match=r"gives no score[^$]*ABSENT"):
        check_server(ServeRewardStage(str(world / "qwen2"), token_env="ABSENT"), 1)
