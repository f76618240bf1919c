"""How it is measured: what is selected, checked against the reference, and timed."""
