"""How fast a QLoRA step is: ours, and other libraries' on the same machine in the same run."""
