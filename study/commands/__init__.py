"""What the command line needs besides the work: options read, findings and messages shown."""
