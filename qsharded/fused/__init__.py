"""A decoder layer as one autograd node: few kernels, few host calls, and its backward recomputes only what it reads."""
