"""Two runs are the same when everything is that decides their steps: settings and inputs, not names, length or speed."""

import shutil
from dataclasses import replace

import pytest

from train_vlm.recipe import Data, Optimizer, Part, Parts, Recipe, Run, Source
from train_vlm.run_identity import PIECE_BYTES, PIECES, describe_run, difference, fingerprint_model, fingerprint_shards


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.index.jsonl").write_text('{"key": "0", "sha256": "x"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return Recipe("sft", str(tmp_path / "model"), str(tmp_path / "out"), Data((Source(str(tmp_path / "shards")),)),
                  Parts(None, Part(1e-4, blocks=2), 1e-3, None), Run(steps=10))  # fmt: skip


def test_length_words_and_speed_may_change(recipe):
    other = replace(
        recipe, out="elsewhere", data=replace(recipe.data, workers=0, micro_batches=4, heldout=recipe.data.sources),
        run=replace(recipe.run, steps=None, minutes=3.0, log_every=1, threads_per_rank=2, keep=7, save_every_steps=5, replace=True),
    )  # fmt: skip
    assert describe_run(other) == describe_run(recipe)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda r: replace(r, stage="align", parts=Parts(projector=1e-3)), "stage"),
        (lambda r: replace(r, data=replace(r.data, batch_samples=16)), "data.batch_samples was 32, is 16"),
        (lambda r: replace(r, data=replace(r.data, sources=(replace(r.data.sources[0], weight=2.0),))), "data.sources.0.weight was 1.0"),
        (lambda r: replace(r, data=replace(r.data, sources=r.data.sources * 2)), "data.sources.1.shards was None"),
        (lambda r: replace(r, optimizer=Optimizer(clip=2.0)), "optimizer.clip was 1.0, is 2.0"),
        (lambda r: replace(r, run=replace(r.run, seed=1)), "run.seed was 0, is 1"),
        (lambda r: replace(r, parts=Parts(None, Part(1e-4, blocks=3), 1e-3, None)), "parts.last_encoder_blocks"),
    ],
)
def test_what_decides_a_step_is_named_when_it_changes(recipe, change, key):
    assert any(key in text for text in difference(describe_run(recipe), describe_run(change(recipe))))


def test_inputs_are_known_by_their_content(recipe, tmp_path):
    """A copy is the same input; another sample in the shards is another one, whatever the folder is called."""
    before = describe_run(recipe)
    shutil.move(tmp_path / "shards", tmp_path / "moved")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    moved = replace(recipe, model=str(tmp_path / "copy"), data=replace(recipe.data, sources=(Source(str(tmp_path / "moved")),)))
    assert describe_run(moved) == before
    (tmp_path / "moved" / "a.index.jsonl").write_text('{"key": "0", "sha256": "y"}\n')
    (tmp_path / "copy" / "config.json").write_text("{ }")
    found = " ".join(difference(before, describe_run(moved)))
    assert "data.sources.0.shards was" in found and "model was" in found


def test_large_files_are_told_apart_by_pieces(tmp_path):
    """Reading 16 GB at every start would take a minute; the pieces reach both ends."""
    path, size = tmp_path / "model.safetensors", 2 * PIECES * PIECE_BYTES
    prints = set()
    for place in (None, 0, size - 1):
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        prints.add(fingerprint_model(tmp_path))
    path.write_bytes(bytes(size + 1))
    prints.add(fingerprint_model(tmp_path))
    assert len(prints) == 4
    (tmp_path / "training.json").write_text("not a part of the model")
    assert fingerprint_model(tmp_path) in prints


def test_an_empty_folder_has_a_fingerprint_too(tmp_path):
    assert fingerprint_shards(tmp_path) == fingerprint_shards(tmp_path / "nowhere")
