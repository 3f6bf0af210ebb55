"""``python -m routingvl`` is ``routingvl``; ``accelerate launch -m routingvl train ...`` starts one process a GPU."""

import sys

from routingvl.cli import main

if __name__ == "__main__":
    sys.exit(main())
