"""A study as a live table: how far its runs are, and how that is drawn."""
