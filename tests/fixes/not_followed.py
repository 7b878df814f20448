"""Fixes that no scenario follows, each with its reason: (file, function, a part of the text) -> why not here.

The part is empty for a fix without any constant text alone: it would also cover what comes later in that function.
"""

NOT_FOLLOWED = {
    (
        "mrlhf/data/prepare/formats.py",
        "_prompt_with_answers",
        "",
    ): "handed to _column, whose text for a null is followed",
    ("mrlhf/checkpoint/optimizer_state.py", "translate", "start from its weights"): "a new run: tests/checkpoint",
    ("mrlhf/checkpoint/reader.py", "read", "take an earlier"): "a copy of a directory, as of check_manifest",
    ("mrlhf/checkpoint/reader.py", "read", "give it the config"): "a copy of a file, as of check_manifest",
    ("mrlhf/checkpoint/reader.py", "_read_chunk", "take an earlier"): "a copy of a directory, as of check_manifest",
    ("mrlhf/convert/hf.py", "initialize_groups", "MRLHF_DEVICE"): "needs a GPU",
    ("mrlhf/data/prepare/template.py", "_guard", "remove special"): "such rows are dropped and counted, never shown",
    ("mrlhf/data/tokenizers/special.py", "guard", "remove special"): "such rows are dropped and counted, never shown",
    ("mrlhf/data/tokenizers/rank_file.py", "_read", "copy the file"): "the published files are not here",
    ("mrlhf/data/tokenizers/rank_file.py", "from_ranks", "copy the file"): "the published files are not here",
    (
        "mrlhf/data/tokenizers/sentencepiece_model.py",
        "from_sentencepiece",
        "own transformers class",
    ): "no model is known whose conversion differs",
    ("mrlhf/rl/health.py", "first_ratio", "--model.dtype"): "a run whose first ratio is wrong: tests/rl/test_health.py",
    ("mrlhf/rl/rewards/process.py", "_exchange", "--reward.function"): "a slow, or a large process: tests/rl/rewards",
    ("mrlhf/training/resume.py", "open_directory", "wait until"): "two runs: tests/observe/test_directory.py",
    ("mrlhf/training/trainer.py", "_reject_step", "learning rate"): "a run that diverges: tests/training",
    ("mrlhf/parallel/device.py", "take_gpu", "torchrun"): "needs GPUs: tests/parallel/test_device.py",
    ("mrlhf/parallel/split.py", "_receive", "same command"): "a lost rank: tests/rl/rollout/test_separate.py",
    ("mrlhf/rl/rewards/server.py", "", "pip install"): "raised at the import, and all tests have the packages",
    ("mrlhf/rl/rollout/vllm_engine.py", "_import_vllm", "make setup"): "all tests have vLLM",
    (
        "mrlhf/rl/rollout/vllm_weights.py",
        "check_weights",
        "plain",
    ): "packed weights on CUDA need a GPU; others are followed",
    ("mrlhf/training/run.py", "close", "remove the reason"): "a whole run: tests/faults/test_layouts.py",
}
