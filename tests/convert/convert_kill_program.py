"""A conversion that kills its own process after COUNT parameters.

usage: convert_kill_program.py {import,export} FROM TO COUNT

COUNT 0: not at all. Prints how many parameters this process wrote.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    os.environ["MRLHF_DEVICE"] = "cpu"
    from mrlhf.checkpoint import tensor_file
    from mrlhf.convert import hf
    from mrlhf.parallel import state

    direction, source, target, count = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    tensor_file._SYNC_BYTES = 1  # every parameter is noted at once
    written = 0
    add = tensor_file.Journal.add

    def counted(self, *args) -> None:
        nonlocal written
        if count and written == count:  # this one's bytes are in the file, and not noted
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *args)
        self.wait()
        written += 1

    tensor_file.Journal.add = counted  # type: ignore[method-assign]
    (hf.hf_to_megatron if direction == "import" else hf.megatron_to_hf)(source, target)
    print(f"wrote {written}")
    state.shutdown()


if __name__ == "__main__":
    main()
