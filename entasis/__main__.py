import sys

from entasis.cli import main

sys.exit(main())
