"""``python -m fxpipe``."""

import sys

from fxpipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
