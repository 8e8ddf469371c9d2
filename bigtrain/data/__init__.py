"""From text to batches: source -> tokenizer -> prepare writes shards once; order -> shards -> pack -> loader reads them.

Nothing here imports torch, so that data can be prepared and checked where it is not installed; a batch becomes tensors
in the task that the loader is given.
"""
