"""Tools for those who work on the project; no stage imports them."""
