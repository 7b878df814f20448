"""`python -m mrlhf` and `torchrun -m mrlhf`.

Megatron's checkpoint writer imports this file again in the children it spawns, so the guard is needed.
"""

from __future__ import annotations

import sys

from mrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
