"""A run's page, and several runs compared, both made from the files in their output folders alone."""
