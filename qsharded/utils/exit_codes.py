"""What a command's exit status says beyond 0 (well) and 1 (an error that a line tells).

torchrun's own is 1 whatever its ranks' are; its report names theirs.
"""

OUT_OF_MEMORY = 74
"""A GPU had no room; the message names settings that fit."""

HANG = 75
"""No rank made progress for ``--hang-timeout``."""
