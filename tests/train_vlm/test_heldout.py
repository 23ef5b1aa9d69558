"""The held-out loss: each sample once, alike for any pack; what is not usable is counted; sources of one name stay apart."""

import numpy as np
import pytest
import torch
from PIL import Image

from train_vlm.batching import pack
from train_vlm.heldout import heldout_loss, heldout_words
from train_vlm.reading import SampleStream
from train_vlm.recipe import Source
from train_vlm.shards import convert
from train_vlm.training_step import forward_inputs


class Engine:
    """As much of DeepSpeed's as the look needs."""

    def __init__(self, module):
        self.module, self.device = module, torch.device("cpu")

    def __call__(self, **inputs):
        return self.module(**inputs)


def turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def stream(tmp_path_factory, tiny_processor):
    """a/val: eight texts, one too long; b/val: three pictures, one broken after it was written."""
    folder = tmp_path_factory.mktemp("heldout")
    texts = [{"id": f"t{number}", "conversations": turns("say " * (300 if number == 5 else 1), f"word {number}")} for number in range(8)]
    convert(texts, folder, tiny_processor, folder / "a" / "val")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "p.png")
    pictures = [{"id": f"p{number}", "image": "p.png", "conversations": turns("<image>", f"{number} balls")} for number in range(3)]
    convert(pictures, folder, tiny_processor, folder / "b" / "val")

    def stream(weights=(1.0, 1.0), seed=0):
        sources = tuple(Source(str(folder / name / "val"), weight=weight) for name, weight in zip("ab", weights, strict=True))
        return SampleStream(sources, tiny_processor, seed=seed, max_tokens=200)

    place, (shard, entry) = stream().sources[1].entries[1][1]["members"]["0.png"], stream().sources[1].entries[1]
    content = bytearray(shard.read_bytes())
    content[place[0] : place[0] + place[1]] = bytes(place[1])
    shard.write_bytes(content)
    assert entry["key"] == "000000001"
    return stream


def test_a_stream_is_read_once_at_most_in_its_own_order(stream):
    """The endless stream gave 100 samples 2.56 times over, some thrice and some twice."""
    for weights in ((1.0, 1.0), (1.0, 50.0)):
        one = stream(weights, seed=3)
        everything = one.once(256)
        assert sorted(everything) == [(0, number) for number in range(8)] + [(1, number) for number in range(3)]
        assert one.once(5) == everything[:5]
    assert one.once(2) == [one.locate(position) for position in range(2)]


@torch.no_grad()
def reference(model, processor, stream) -> tuple[list[float], list[int]]:
    """Sums of losses and supervised tokens of each source, a sample at a time."""
    losses, tokens = [0.0, 0.0], [0, 0]
    for source, samples in enumerate(stream.sources):
        for number in range(len(samples)):
            if "skipped" in (sample := stream.sample(source, number)):
                continue
            batch = pack([sample], 0, processor.image_processor.tile_size)
            output = model(**forward_inputs(batch, processor, torch.device("cpu"), torch.float32), num_items_in_batch=1)
            losses[source] += output.loss.item()
            tokens[source] += batch["supervised_tokens"]
    return losses, tokens


def test_the_loss_is_that_of_every_sample_once_with_two_sources_of_one_name(stream, tiny_model, tiny_processor, one_rank):
    """a/val and b/val wrote over each other."""
    losses, tokens = reference(tiny_model, tiny_processor, stream())
    assert losses[0] / tokens[0] != pytest.approx(losses[1] / tokens[1], rel=1e-3)
    for size in (1, 4, 16):
        found, ledger = heldout_loss(Engine(tiny_model), stream((1.0, 3.0)), tiny_processor, samples=256, pack_samples=size)
        assert found["heldout_loss"] == pytest.approx(sum(losses) / sum(tokens), rel=1e-5)
        assert found["heldout_loss/val"] == pytest.approx(losses[0] / tokens[0], rel=1e-5)
        assert found["heldout_loss/val-2"] == pytest.approx(losses[1] / tokens[1], rel=1e-5)
        assert (found["heldout_samples"], found["heldout_skipped"]) == (9, 2)
    assert [(row["seen"], row["too long"], row["broken"]) for row in ledger.to_dict()["sources"]] == [(8, 1, 0), (3, 0, 1)]
    words = heldout_words(found, ledger.to_dict())
    assert words.endswith("9 of 11 samples used, skipped: 1 broken, 1 too long")


def test_without_a_usable_sample_there_is_no_loss(stream, tiny_model, tiny_processor, one_rank):
    """0.0 would be the best run so far."""
    nothing = stream()
    nothing.max_tokens = 3
    found, ledger = heldout_loss(Engine(tiny_model), nothing, tiny_processor, samples=4, pack_samples=2)
    assert found == {"heldout_samples": 0, "heldout_skipped": 4}
    assert heldout_words(found, ledger.to_dict()).startswith("held-out loss not measured: 0 of 4 samples used, skipped: ")
