"""The command line; with DOOM=RANK:STEP that process dies without a word at that step of the first try."""

import os
import signal
import sys
from typing import Any

from polytask.cli import main
from polytask.engine import phase

if __name__ == "__main__":
    rank, step = os.environ["DOOM"].split(":")
    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        original, left = phase.train_step, iter(range(int(step) - 1, -1, -1))

        def doomed(*arguments: Any, **options: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        phase.train_step = doomed
    sys.exit(main(sys.argv[1:]))
