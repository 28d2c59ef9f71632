"""The runtime type checker of the tests: beartype, an int where a float is asked for being fine (PEP 484)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
