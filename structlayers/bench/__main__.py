"""``python -m structlayers.bench COMMAND [options]``: the benchmarks, their report and their comparison."""

import os
import sys
from importlib import import_module

COMMANDS = {
    "kernels": "one factor by every backend, over patterns, dtypes and layouts",
    "chains": "whole chains beside dense, unfused and planned, frozen or not",
    "training": "forward and backward passes of chains, and whole training steps",
    "report": "report.md and report.html from result files",
    "compare": "two result files: faster, slower or the same, case by case",
}
_MODULES = {"compare": "verdicts"}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        text = [f"  {command:<9} {what}" for command, what in COMMANDS.items()]
        usage = "\n".join(
            ["python -m structlayers.bench COMMAND [options]; --help after a command lists its options", *text]
        )
        if name in ("-h", "--help"):
            print(usage)
            return
        sys.exit(usage)
    # The profiler that measures CPU memory writes a line to stderr at every start and stop; its library reads this
    # once.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import_module(f"structlayers.bench.{_MODULES.get(name, name)}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
