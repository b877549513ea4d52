"""What survives a killed process or a lost machine: resume states, the storage off the machine, leases."""
