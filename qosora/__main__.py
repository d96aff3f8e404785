"""`python -m qosora`."""

import sys

from qosora.cli import main

if __name__ == "__main__":
    sys.exit(main())
