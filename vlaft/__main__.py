"""`vlaft` and `python -m vlaft`, which also lets `accelerate launch -m vlaft` and `torchrun -m vlaft` start it."""

import sys

from vlaft.cli import interrupts


def main() -> int:
    """Run the command that the process was started with and return its exit code."""
    interrupts.leave_at_once()
    from vlaft.cli.main import main as run

    code = run()
    interrupts.ignore()
    return code


if __name__ == "__main__":
    sys.exit(main())
