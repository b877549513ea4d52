"""What is found out about finished models, and kept in the ledger: robustness, attention."""
