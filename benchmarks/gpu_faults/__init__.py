"""What of the faults in docs/faults.md takes GPUs to be shown."""
