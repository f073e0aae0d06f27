"""``python -m klrl`` is the command ``klrl``."""

import os
import sys

if sys.path[:1] == [os.getcwd()]:  # where ``-m`` looks first: a random.py there would run in place of Python's
    del sys.path[0]

from klrl.cli.main import main

if __name__ == "__main__":
    main()
