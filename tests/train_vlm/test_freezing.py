"""What trains, what decays, and the printed table."""

import copy

import pytest
from torch import nn

from train_vlm.freezing import apply_parts, encoder_blocks, make_optimizer, parameter_groups, part_modules, parts_table
from train_vlm.recipe import Optimizer, Part, Parts
from vision_encoders import build_vision_encoder

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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_part_s_own_decay_and_warm_up_go_before_the_optimizer_s(model, kind):
    """A 0 of its own is a value, not a missing one; what a part does not say is the optimizer's; norms and biases are never decayed."""
    parts = Parts(
        vision_encoder=Part(1e-4, weight_decay=0.2, warmup=0.5), projector=Part(1e-3, weight_decay=0.0, warmup=0.0), language_model=1e-4
    )
    apply_parts(model, parts)
    groups = parameter_groups(model, parts, Optimizer(kind=kind, weight_decay=0.3, warmup=0.1))
    decays = {part: {group["weight_decay"] for group in groups if group["part"] == part} for part in PARTS}
    assert decays == {"vision_encoder": {0.2, 0.0}, "projector": {0.0}, "language_model": {0.3, 0.0}}
    assert {(group["part"], group["warmup"]) for group in groups} == {("vision_encoder", 0.5), ("projector", 0.0), ("language_model", 0.1)}
    norms = {id(p) for module in model.vision_encoder.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    assert all(group["weight_decay"] == 0.0 for group in groups for p in group["params"] if id(p) in norms)
    lines = {line.split()[0]: line for line in parts_table(model, parts, groups).splitlines()[1:]}
    assert lines["vision_encoder"].endswith("decay 0.2 and 0, warm-up 0.5") and lines["projector"].endswith("decay 0, warm-up 0")
    assert lines["language_model"].endswith("decay 0.3 and 0, warm-up 0.1")


SMALL = {"image_size": 32, "patch_size": 8}
ENCODERS = {
    # name: settings, where its blocks are, what stands behind the last one
    "internvit": (SMALL | {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 2},
                  ["tower.encoder.layer.0.", "tower.encoder.layer.1.", "tower.encoder.layer.2."], ()),
    "timm:vit_tiny_patch16_224": (SMALL | {"embed_dim": 32, "depth": 3, "num_heads": 2},
                                  ["tower.blocks.0.", "tower.blocks.1.", "tower.blocks.2."], ("tower.norm.",)),
    "timm:resnet10t": ({"image_size": 32}, ["tower.layer1.0.", "tower.layer2.0.", "tower.layer3.0.", "tower.layer4.0."], ()),
}  # fmt: skip


@pytest.fixture(params=ENCODERS)
def tower(request, model):
    """(the model with another encoder, prefixes of its blocks' parameters, those of what stands behind)."""
    settings, blocks, behind = ENCODERS[request.param]
    model.vision_encoder = build_vision_encoder(request.param, **settings)
    return model, blocks, behind


@pytest.mark.parametrize("count", [1, 2])
def test_the_last_blocks_are_those_nearest_the_features_and_the_norm_behind(tower, count):
    """By name, for a tower with a norm behind its blocks, one without, and stages of a ResNet; each parameter is in one part, and only the
    last blocks train, in train mode."""
    model, blocks, behind = tower
    parts = Parts(last_encoder_blocks=Part(1e-5, blocks=count), projector=1e-3)
    apply_parts(model, parts)
    found = part_modules(model, parts)
    every = [name for name, _ in model.vision_encoder.named_parameters()]
    expected = [name for name in every if name.startswith((*blocks[-count:], *behind))]
    assert [name for name, _ in found["last_encoder_blocks"]] == expected
    assert any(name.startswith(behind) for name in expected) == bool(behind)
    assert [name for name, _ in found["vision_encoder"]] == [name for name in every if name not in expected]
    assert [name for name, p in model.vision_encoder.named_parameters() if p.requires_grad] == expected
    groups = [group for group in parameter_groups(model, parts, Optimizer()) if group["part"] == "last_encoder_blocks"]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for _, p in found["last_encoder_blocks"]}
    assert {group["peak_lr"] for group in groups} == {1e-5}
    modes = [block.training for block in encoder_blocks(model.vision_encoder)]
    assert modes == [False] * (len(blocks) - count) + [True] * count
    norms = {name: module.training for name, module in model.vision_encoder.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert all(training == name.startswith(tuple(blocks[-count:])) for name, training in norms.items())


def test_the_last_blocks_may_have_a_rate_beside_the_rest_of_the_encoder(tower):
    model, blocks, behind = tower
    parts = Parts(vision_encoder=1e-6, last_encoder_blocks=Part(1e-5, blocks=1), projector=1e-3)
    apply_parts(model, parts)
    rates = {id(p): group["peak_lr"] for group in parameter_groups(model, parts, Optimizer()) for p in group["params"]}
    for name, parameter in model.vision_encoder.named_parameters():
        assert rates[id(parameter)] == (1e-5 if name.startswith((blocks[-1], *behind)) else 1e-6), name


def test_more_last_blocks_than_there_are_is_an_error(tower):
    model, blocks, _ = tower
    parts = Parts(last_encoder_blocks=Part(1e-5, blocks=len(blocks) + 1))
    with pytest.raises(ValueError, match=f"blocks is {len(blocks) + 1}; the vision encoder has {len(blocks)}"):
        apply_parts(model, parts)


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


TABLES = {
    # name: settings, endings of what no decay and no Muon may touch
    "open_clip:ViT-B-32": (SMALL | {"width": 32, "layers": 3, "head_width": 16}, ("positional_embedding", "class_embedding")),
    "timm:vit_tiny_patch16_224": (
        {"image_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "reg_tokens": 12}, ("pos_embed", "cls_token", "reg_token")
    ),
    "timm:swin_tiny_patch4_window7_224": (
        {"image_size": 64, "window_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (16, 16)}, ("relative_position_bias_table",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_what_a_tower_knows_of_places_is_neither_decayed_nor_orthogonalized(model, name):
    """CLIP's positions are a matrix by their shape: they were decayed, and under Muon turned into one with all singular values alike."""
    settings, endings = TABLES[name]
    model.vision_encoder = build_vision_encoder(name, **settings)
    parts = Parts(vision_encoder=1e-4)
    apply_parts(model, parts)
    names = {id(p): name for name, p in model.vision_encoder.named_parameters()}
    groups = parameter_groups(model, parts, Optimizer(kind="muon", weight_decay=0.3))
    for ending in endings:
        own = [group for group in groups for p in group["params"] if names.get(id(p), "").endswith(ending)]
        assert own and all((group["kind"], group["weight_decay"]) == ("adamw", 0.0) for group in own)
    assert any((group["kind"], group["weight_decay"]) == ("muon", 0.3) for group in groups)
