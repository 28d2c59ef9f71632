"""`python -m tvaprune VERB`, the same as `tvaprune VERB` where the package is installed."""

from tvaprune.commands import main

if __name__ == "__main__":
    main()
