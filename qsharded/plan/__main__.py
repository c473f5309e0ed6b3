"""``python -m qsharded.plan`` is ``qsharded plan``: a run of training that ends before anything is loaded."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "--dry-run")
    runpy.run_module("qsharded.train", run_name="__main__", alter_sys=True)
