"""Write docs/bad-inputs.md anew, from what every stage says: `python -m tests.bad_inputs`."""

from tests.bad_inputs.table import PAGE, run_all, table

if __name__ == "__main__":
    PAGE.write_text(table(run_all()))
