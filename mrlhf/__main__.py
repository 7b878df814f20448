"""`python -m mrlhf` and `torchrun -m mrlhf`. The guard matters: Megatron's checkpoint writer re-imports this file in spawned children."""

from __future__ import annotations

import sys

from mrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
