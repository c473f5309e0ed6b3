"""The entry point that bitsandbytes calls when it is imported. It imports nothing until it is asked to."""

import os


def bitsandbytes_backend() -> None:
    """Put our kernels behind bitsandbytes' operations where QSHARDED_BITSANDBYTES=1."""
    if os.environ.get("QSHARDED_BITSANDBYTES") == "1":
        from qsharded.integrations.bitsandbytes_kernels import install

        install()
