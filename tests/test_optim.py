"""Which parameters decay, which are Muon's, and that no parameter is forgotten or counted twice."""

import pytest
import torch
from torch import nn

from bigtrain.config import Model, Optimizer
from bigtrain.model.transformer import Transformer
from bigtrain.optim import parameter_groups

SHAPE = {"layers": 2, "width": 16, "heads": 2, "mlp_width": 24, "max_positions": 8}


def model(**changes) -> Transformer:
    """A model with everything in it that an optimizer could trip over: biases, learned positions, norms with a bias."""
    whole = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "attention_bias": True, "mlp_bias": True}
    return Transformer(Model(**{**SHAPE, **whole, **changes}), 32)


def names(module: nn.Module, group: dict) -> set[str]:
    known = {id(p): name for name, p in module.named_parameters()}
    return {known[id(p)] for p in group["params"]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd", "rmsprop"])
def test_every_parameter_is_in_one_group(name, tied):
    module = model(tied_embeddings=tied)
    groups = parameter_groups(module, Optimizer(name=name, lr=0.1))
    together = [id(p) for g in groups for p in g["params"]]
    assert sorted(together) == sorted(id(p) for p in module.parameters())
    assert all(g["lr"] == g["lr_base"] for g in groups)
    assert any("head.weight" in names(module, g) for g in groups) is not tied


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "rmsprop"])
def test_matrices_and_embeddings_decay_and_vectors_do_not(name):
    module = model()
    decay, vectors = parameter_groups(module, Optimizer(name=name, lr=0.1, weight_decay=0.3))
    assert (decay["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert names(module, decay) == {n for n, _ in module.named_parameters() if n.endswith(".weight") and "norm" not in n}
    assert {"embedding.weight", "positions.weight", "head.weight"} <= names(module, decay)
    assert {"final_norm.weight", "final_norm.bias", "layers.0.attention.q.bias"} <= names(module, vectors)
    assert not any(hasattr(p, "use_muon") for p in module.parameters())


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    module = model()
    muon, decay, vectors = parameter_groups(
        module, Optimizer(name="muon", lr=0.02, adam_lr=0.003, betas=[0.8, 0.9], eps=1e-9, momentum=0.7)
    )
    matrices = {f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("attention.q", "attention.k", "attention.v", "attention.o")}
    matrices |= {f"layers.{i}.mlp.{part}.weight" for i in (0, 1) for part in ("up", "down")}
    assert names(module, muon) == matrices
    assert names(module, decay) == {"embedding.weight", "positions.weight", "head.weight"}
    assert (muon["use_muon"], muon["lr"], muon["momentum"]) == (True, 0.02, 0.7)
    for group in (decay, vectors):
        assert (group["use_muon"], group["lr"], group["betas"], group["eps"]) == (False, 0.003, (0.8, 0.9), 1e-9)
    assert (muon["weight_decay"], decay["weight_decay"], vectors["weight_decay"]) == (0.1, 0.1, 0.0)
    assert {n for n, p in module.named_parameters() if p.use_muon} == matrices  # DeepSpeed wants the mark on every parameter


def test_muon_without_a_learning_rate_for_adamw_uses_its_own():
    assert {g["lr"] for g in parameter_groups(model(), Optimizer(name="muon", lr=0.02))} == {0.02}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_partitioned_parameters_are_judged_by_their_whole_shape(name):
    """Under ZeRO-3 a parameter's own shape is empty and `ds_shape` has the whole one."""
    whole, partitioned = model(), model()
    for p in partitioned.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0)
    settings = Optimizer(name=name, lr=0.1)
    expected = [names(whole, g) for g in parameter_groups(whole, settings)]
    assert [names(partitioned, g) for g in parameter_groups(partitioned, settings)] == expected


def test_frozen_parameters_and_empty_groups_are_left_out():
    module = model()
    for name, p in module.named_parameters():
        p.requires_grad = name.endswith("o.weight")
    [group] = parameter_groups(module, Optimizer(lr=0.1))
    assert names(module, group) == {"layers.0.attention.o.weight", "layers.1.attention.o.weight"}
