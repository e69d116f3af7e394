"""``python -m fedmutual``."""

import sys

from fedmutual.cli import main

if __name__ == "__main__":
    sys.exit(main())
