"""`python -m nemo_hybrid COMMAND`, also under torchrun."""

import sys

from nemo_hybrid.cli import main

if __name__ == "__main__":
    sys.exit(main())
