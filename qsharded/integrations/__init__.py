"""Our 4-bit backend in other libraries: one module a library, each imported by its user alone."""
