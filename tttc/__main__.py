"""``python -m tttc``."""

import sys

from tttc.cli import main

if __name__ == "__main__":
    sys.exit(main())
