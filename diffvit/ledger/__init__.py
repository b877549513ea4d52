"""The ledger: what a run is, what it is called, and the files that say it is done."""
