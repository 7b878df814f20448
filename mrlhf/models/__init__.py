"""GPT models on megatron-core, and what ties them to HF's files and to vLLM."""

import mrlhf.parallel  # noqa: F401  (chooses the device before anything here imports megatron.core)
