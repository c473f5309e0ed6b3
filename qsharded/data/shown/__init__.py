"""Rows as the model will see them, for people: on a terminal, in a log, and as a page."""
