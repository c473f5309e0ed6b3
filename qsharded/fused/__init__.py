"""A decoder layer as one autograd node: few kernels, few host calls, and in backward only what it reads is recomputed."""
