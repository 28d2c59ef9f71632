"""Tools for those who work on the project; no stage imports them."""

import sys

if sys.argv[0] == "-m":  # a tool runs; a program that imports one is not changed
    from tvaprune import quiet_libraries

    quiet_libraries()
