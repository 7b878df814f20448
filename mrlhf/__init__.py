"""mrlhf: RLHF training on Megatron-core, from two CPU cores to many H100s with the same code path."""

__version__ = "0.1.0"
