"""bigtrain: distributed training of transformers, from a laptop without a GPU to many nodes."""

__version__ = "0.1.0"
