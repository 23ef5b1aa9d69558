"""What trains, what decays, and the printed table."""

import copy

import pytest

from train_vlm.freezing import apply_parts, make_optimizer, parameter_groups, parts_table
from train_vlm.recipe import Optimizer, Parts

PARTS = ("vision_encoder", "projector", "language_model")


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


@pytest.mark.parametrize("trained", [("projector",), ("projector", "language_model"), PARTS])
def test_only_named_parts_train_and_each_parameter_once(model, trained):
    """A parameter in no group never learns; one in two groups takes two steps."""
    parts = Parts(**{name: 1e-4 if name in trained else None for name in PARTS})
    apply_parts(model, parts)
    grouped = [p for group in parameter_groups(model, parts, Optimizer()) for p in group["params"]]
    expected = {id(p) for name in trained for p in getattr(model, name).parameters()}
    assert {id(p) for p in grouped} == expected and len(grouped) == len(expected)
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected
    assert all(getattr(model, name).training == (name in trained) for name in PARTS)


def test_rates_are_those_of_the_parts(model):
    parts = Parts(vision_encoder=1e-5, projector=1e-3, language_model=1e-4)
    apply_parts(model, parts)
    for group in parameter_groups(model, parts, Optimizer()):
        assert group["lr"] == group["peak_lr"] == getattr(parts, group["part"])


def test_norms_biases_embeddings_and_the_scan_are_not_decayed(model):
    """Decay pulls A_log and dt_bias to 0, which is another memory length, not a smaller one."""
    parts = Parts(vision_encoder=1e-4, projector=1e-4, language_model=1e-4)
    apply_parts(model, parts)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in parameter_groups(model, parts, Optimizer(weight_decay=0.3))
        for p in group["params"]
    }
    free = (
        "A_log",
        ".D",
        "dt_bias",
        "norm.weight",
        ".bias",
        "embeddings.weight",
        "cls_token",
        "position_embeddings",
        "norm_f.weight",
        "lambda_1",
    )
    for name, value in decay.items():
        assert value == (0.0 if name.endswith(free) or model.get_parameter(name).ndim < 2 else 0.3), name
    for name in ("language_model.model.layers.0.mixer.in_proj.weight", "projector.linear_1.weight", "language_model.lm_head.weight"):
        assert decay[name] == 0.3


def test_the_table_counts_parameters(model):
    parts = Parts(projector=1e-4)
    apply_parts(model, parts)
    groups = parameter_groups(model, parts, Optimizer())
    lines = {line.split()[0]: line.split()[1:] for line in parts_table(model, parts, groups).splitlines()[1:]}
    counts = model.parameter_counts()
    assert lines["language_model"][:1] == [f"{counts['language_model']:,}"] and lines["language_model"][-1] == "frozen"
    assert lines["projector"][:4] == [f"{counts['projector']:,}", f"{counts['projector']:,}", "float32", "0.0001,"]


def test_the_optimizer_takes_the_recipe_s_betas(model):
    parts = Parts(projector=1e-4)
    apply_parts(model, parts)
    optimizer = make_optimizer(parameter_groups(model, parts, Optimizer()), Optimizer(beta1=0.8, beta2=0.7))
    assert all(group["betas"] == (0.8, 0.7) for group in optimizer.param_groups)
