"""The model: one transformer for Llama-like, GPT-2-like and BERT-like shapes.

    transformer.py  the module, its forward pass, its size in parameters and FLOPs
    layers.py       attention, MLP, norm, block, head: modules that hold the weights and call the kernels
    cache.py        keys and values of past positions, for generation
    initialise.py   the first value of every parameter, from (seed, name)
    hf.py           weights and shapes from and to Hugging Face

Knows no rank, no device, no environment variable and no engine.
"""
