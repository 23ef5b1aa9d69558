"""Recipes: every way to be wrong dies with the key's name before a model is touched."""

import pytest
import yaml

from train_vlm.recipe import Recipe, RecipeError, load_recipe

GOOD = {
    "stage": "sft",
    "model": "in",
    "out": "out",
    "data": {"sources": [{"shards": "a"}], "batch_samples": 8, "micro_batches": 2},
    "parts": {"vision_encoder": None, "projector": "1e-3", "language_model": 2e-5},
    "run": {"steps": 10},
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def test_a_recipe_is_read_with_its_defaults(write):
    """YAML reads 1e-3 as text; a rate must be a number all the same."""
    recipe = load_recipe(write(GOOD))
    assert isinstance(recipe, Recipe)
    assert (recipe.parts.projector, recipe.parts.language_model, recipe.parts.vision_encoder) == (1e-3, 2e-5, None)
    assert recipe.data.sources[0].shards == "a" and recipe.optimizer.clip == 1.0 and recipe.run.zero_stage == 1


def test_overrides_are_parsed_as_yaml(write):
    recipe = load_recipe(write(GOOD), ["run.steps=3", "parts.projector=null", "data.sources.0.weight=2.5", "optimizer.clip=1e1", "out=x=y"])
    assert (recipe.run.steps, recipe.parts.projector, recipe.data.sources[0].weight, recipe.optimizer.clip) == (3, None, 2.5, 10.0)
    assert recipe.out == "x=y"


WRONG = [
    ("run.stepz=3", "unknown key run.stepz; did you mean run.steps"),
    ("rum.steps=3", "unknown key rum; did you mean run"),
    ("data.sources.0.weigth=1", "unknown key data.sources.0.weigth; did you mean data.sources.0.weight"),
    ("data.sources.7.weight=1", "unknown key data.sources.7.weight; data.sources is a list of 1, counted from 0"),
    ("parts.language_model.warmup=0.1", "is 2e-05, a single value; give all its keys: parts.language_model={warmup: ..."),
    ("run={steps: 3, steps: 4}", "the key steps stands twice in a section, again on line 1"),
    ("run.seed=-1", "run.seed is -1"),
    ("run.seed=9223372036854775808", "run.seed is 9223372036854775808"),
    ("out=.", "out is '.'; expected the name of a folder"),
    ("out=runs/sweep[rate=1e-4]", "expected the name of a folder to make, without any of * ? ["),
    ("run.steps", "is no override; expected key=value"),
    ("run.steps=[", "is no valid YAML value"),
    ("run.steps=many", "run.steps is 'many'; expected int or None"),
    ("run.steps=2.5", "run.steps is 2.5; expected int or None"),
    ("run.steps=.inf", "run.steps is inf; expected int or None"),
    ("run.steps=true", "run.steps is True"),
    ("run.steps=0", "expected more than 0"),
    ("run.minutes=1", "give exactly one of them"),
    ("run.zero_stage=4", "expected 0, 1, 2 or 3"),
    ("run.precision=fp16", "expected float32 or bfloat16"),
    ("run.activation_checkpointing=3", "run.activation_checkpointing is 3; expected bool"),
    ("run.log_every=0", "run.log_every is 0"),
    ("run.threads_per_rank=0", "run.threads_per_rank is 0"),
    ("run=3", "run. is 3; expected keys and values"),
    ("stage=train", "expected align or sft"),
    ("stage=align", "stage align trains the projector"),
    ("parts.projector=-1", "expected a learning rate above 0, or null"),
    ("parts={vision_encoder: null, projector: null, language_model: null}", "every part is frozen"),
    ("optimizer.warmup=1", "expected shares between 0 and 1"),
    ("optimizer.final=.nan", "expected shares between 0 and 1"),
    ("optimizer.clip=0", "clip above 0"),
    ("optimizer.beta2=1", "expected betas in"),
    ("data.sources=[]", "data.sources is empty"),
    ("data.sources=a", "expected a list of"),
    ("data.sources.0=a", "data.sources.0. is 'a'; expected keys and values"),
    ("data.sources.0.weight=0", "expected more than 0"),
    ("data.sources.0.weight=.inf", "data.sources.weight is inf"),
    ("data.sources.0.max_tiles=0", "max_tiles is 0"),
    ("data.batch_samples=0", "data.batch_samples is 0"),
    ("data.workers=-1", "data.workers is -1"),
    ("model=null", "model is None; expected str"),
]


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[override for override, _ in WRONG])
def test_a_wrong_value_is_named(write, override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize("missing", ["stage", "model", "out", "data", "parts", "run"])
def test_a_missing_key_is_named(write, missing):
    with pytest.raises(RecipeError, match=f"missing key {missing}"):
        load_recipe(write({key: value for key, value in GOOD.items() if key != missing}))


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "is no valid YAML"), ("- 1", "holds list"), ("", "holds NoneType"), ("5", "holds int")]
)
def test_what_is_no_recipe_is_refused(write, content, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(content))


def test_a_key_that_stands_twice_is_refused(write):
    """YAML takes the last of two `run` sections: the steps of the first were trained by nobody's wish."""
    twice = yaml.safe_dump(GOOD) + "run: {steps: 7}\n"
    with pytest.raises(RecipeError, match=f"the key run stands twice in a section, again on line {twice.count(chr(10))}"):
        load_recipe(write(twice))


def test_a_section_may_be_merged_from_another(write):
    """YAML's `<<` brings defaults that may be overridden: no key stands twice there."""
    merged = yaml.safe_dump(GOOD).replace("run:", "run: &run") + "plan:\n  <<: {samples: 4, tiles: 2}\n  samples: 5\n"
    assert load_recipe(write(merged)).plan.samples == 5


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="no recipe at nowhere.yaml"):
        load_recipe("nowhere.yaml")


def test_the_batch_must_divide(write):
    """3 ranks x 2 micro-batches of 8 samples would drop some of them."""
    recipe = load_recipe(write(GOOD))
    assert recipe.deepspeed_config(4)["gradient_accumulation_steps"] == 2
    with pytest.raises(RecipeError, match="data.batch_samples is 8; expected a multiple of ranks x micro_batches = 3 x 2"):
        recipe.deepspeed_config(3)


def test_bfloat16_without_zero_is_refused(write):
    """DeepSpeed's stage 0 counts one optimizer step too many: wrong bias correction, and nobody notices."""
    with pytest.raises(RecipeError, match="use stage 1 or higher"):
        load_recipe(write(GOOD), ["run.zero_stage=0", "run.precision=bfloat16"])


def test_the_settings_for_deepspeed_follow_the_recipe(write):
    config = load_recipe(write(GOOD), ["run.zero_stage=3", "run.precision=bfloat16", "optimizer.clip=0.5"]).deepspeed_config(2)
    assert config["zero_optimization"]["stage"] == 3 and config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert config["bf16"]["enabled"] is True and config["gradient_clipping"] == 0.5
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
