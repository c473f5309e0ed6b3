"""What tools/make_builtin.py makes the built-in model and its data from."""
