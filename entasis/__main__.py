"""`python -m entasis`, as torchrun starts it."""

import os
import sys

try:
    from entasis.cli import main
except KeyboardInterrupt:  # before there is a command that could say it
    if os.environ.get("RANK", "0") == "0":
        print("entasis: stopped by Ctrl-C", file=sys.stderr)
    sys.exit(1)

sys.exit(main())
