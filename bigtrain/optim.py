"""Which parameters an optimizer treats alike. Building the optimizer itself is the engine's: some are DeepSpeed's."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

from torch import nn

from bigtrain.config import Optimizer
from bigtrain.errors import UserError


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Exclude the parameters whose names match one of `patterns` (shell style) from training.

    Raises UserError for a pattern that matches none, and when nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(parameters, pattern)
        if not matching:
            near = difflib.get_close_matches(pattern, parameters, 1, 0)
            raise UserError(f"train.frozen: no parameter is called {pattern!r}; this model has {len(parameters)}, such as {near[0]}")
        for name in matching:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError("train.frozen: nothing is left to train; leave some parameters out")


def parameter_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Groups of `model`'s parameters for `optimizer`, each with lr, `lr_base` and weight_decay; empty groups left out.

    Parameters of two or more dimensions decay; vectors (norms, biases) do not. With Muon (Jordan et al. 2024) the
    matrices of the blocks are Muon's and everything else, embeddings and head among it, is AdamW's; every
    parameter is marked `use_muon`, as DeepSpeed's Muon requires.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = optimizer.name == "muon"
    for name, p in named:
        if muon:
            p.use_muon = _dimensions(p) == 2 and name.startswith("layers.")

    def group(parameters: list[nn.Parameter], decay: bool, lr: float, **more: Any) -> dict[str, Any]:
        return {"params": parameters, "lr": lr, "lr_base": lr, "weight_decay": optimizer.weight_decay if decay else 0.0, **more}

    decay = [p for _, p in named if _dimensions(p) >= 2 and not getattr(p, "use_muon", False)]
    vectors = [p for _, p in named if _dimensions(p) < 2]
    if not muon:
        groups = [group(decay, True, optimizer.lr), group(vectors, False, optimizer.lr)]
    else:
        matrices = [p for _, p in named if p.use_muon]
        adam = {"use_muon": False, "betas": tuple(optimizer.betas), "eps": optimizer.eps}
        adam_lr = optimizer.adam_lr or optimizer.lr
        groups = [
            group(matrices, True, optimizer.lr, use_muon=True, momentum=optimizer.momentum),
            group(decay, True, adam_lr, **adam),
            group(vectors, False, adam_lr, **adam),
        ]
    return [g for g in groups if g["params"]]


def _dimensions(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a parameter's own shape is empty; DeepSpeed keeps the whole one beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))
