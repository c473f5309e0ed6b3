"""A plan of what a run takes, before anything is loaded: ``memory`` is its heart."""
