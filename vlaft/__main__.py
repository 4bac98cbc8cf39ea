"""`python -m vlaft`, which also lets `accelerate launch -m vlaft` and `torchrun -m vlaft` start it."""

import sys

from vlaft.cli.main import main

sys.exit(main())
