"""`mrlhf ARGS`, stopped as by a signal after so many steps.

usage: stop_after_program.py STEPS STAGE --section.key VALUE ...
"""

from __future__ import annotations

import sys


def main() -> int:
    from mrlhf.cli import main as mrlhf
    from mrlhf.training.stopping import Stopper

    left = int(sys.argv[1])

    def agree_to_stop(self: Stopper, *, next_s: float = 0.0) -> bool:
        nonlocal left
        left -= 1
        self.reason = "the test"
        return left == 0

    Stopper.agree_to_stop = agree_to_stop  # type: ignore[method-assign]
    return mrlhf(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
