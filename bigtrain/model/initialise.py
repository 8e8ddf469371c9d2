"""The first value of every parameter: a function of (seed, name, shape, config) alone.

So it does not depend on the order of creation, on how many ranks there are or on how the parameters are partitioned, and
one parameter can be made at a time. Matrices and embeddings, padding rows included, are normal with `init_std`; the outputs
into the residual stream (`o`, `down`) have init_std / sqrt(2 layers), so that the variance of the stream does not grow
with depth (Radford et al. 2019, section 2.3); norm weights are 1 and biases 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bigtrain import config as schema


def initial_value(name: str, shape: Sequence[int], config: schema.Model, seed: int) -> Tensor:
    """The initial value of the parameter `name`: float32, on the CPU, the same wherever it is made."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = config.init_std
    if name.endswith((".o.weight", ".down.weight")):
        std /= (2 * config.layers) ** 0.5
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter of a `Transformer` whose parameters are whole, in their own dtype and on their own device."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))
