"""`python -m bitgrain` is `bitgrain`."""

import sys

from bitgrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
