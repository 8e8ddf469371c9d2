"""Checkpoints: what is in one (format), writing (save), reading (load), and the adapter to DeepSpeed's state (state)."""
