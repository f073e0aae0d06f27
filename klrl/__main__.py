"""``python -m klrl`` is the command ``klrl``."""

from klrl.cli.main import main

if __name__ == "__main__":
    main()
