"""The models, the questions and the ways of answering that benchmarks/engine.py compares; each way runs in a process of its own.

python benchmarks/engine_work.py WAY FOLDER reads one JSON order a line and answers each with one line. WAY is one of WAYS below. The stock
ways use transformers' NemotronHForCausalLM and its `generate` as they are; nothing of ours is set on that model. Encoder, projector,
processor and weights are the same files for all.
"""

import json
import os
import random
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.models.nemotron_h import NemotronHForCausalLM  # noqa: E402

from vlm.assemble import assemble  # noqa: E402
from vlm.checkpoint import load_model, save_model  # noqa: E402
from vlm.decoder import preset_config  # noqa: E402
from vlm.small_tokenizer import train_small_tokenizer  # noqa: E402

TEMPLATES = (
    "What colour is the {}?",
    "How many {}s are there?",
    "Is there a {} in the picture?",
    "What is to the left of the {}?",
    "What is written on the {}?",
    "Is the {} larger than the table?",
    "What shape is the {}?",
    "What is the person next to the {} doing?",
)
THINGS = ("ball", "dog", "red car", "small box", "lamp", "boat on the water", "woman with the umbrella", "clock", "green door", "sign")
PROMPT = "{}\nAnswer the question using a single word or phrase."

HYBRID = {  # Nemotron-H at width 512: the 8B's pattern, cut; its 16 Mamba heads a group, head widths and state; the 4B's FFN of 4 x width
    "pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-", "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 1,
    "chunk_size": 128,
}  # fmt: skip
VIT_TINY = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}
MODELS = ("tiny", "hybrid")
TILES = 7  # of a picture, the thumbnail included


def questions(count: int) -> list[str]:
    """Different questions of the kind and length that VQA data sets have."""
    every = [template.format(thing) for template in TEMPLATES for thing in THINGS]
    random.Random(0).shuffle(every)
    return [PROMPT.format(every[index % len(every)]) for index in range(count)]


def build(name: str, folder: Path) -> dict:
    """Random weights, and a tokenizer that knows the questions' words (so that a question has as many tokens as with a real one); returns
    parameters of the parts, positions the encoder computes for a picture, and weights of the decoder's layers."""
    texts = [*questions(80) * 20, *["system user assistant", "Follow the user's instruction and answer questions."] * 20]
    corpus = folder.with_suffix(".txt")
    corpus.write_text("\n".join(texts), encoding="utf-8")
    if name == "tiny":
        model, processor = assemble("tiny", tokenizer_corpus=[str(corpus)])
    else:
        torch.manual_seed(0)
        tokenizer = train_small_tokenizer(texts)
        config = preset_config("tiny", **HYBRID, vocab_size=-(-len(tokenizer) // 64) * 64)
        decoder = folder.with_suffix(".decoder")
        NemotronHForCausalLM(config).save_pretrained(decoder)
        tokenizer.save_pretrained(decoder)
        model, processor = assemble(language_model=decoder, vision_encoder="internvit", vision_settings=VIT_TINY)
    save_model(model, processor, folder)
    vision = model.config.vision_config
    positions = TILES * (1 + (vision.image_size // vision.patch_size) ** 2)
    body = sum(parameter.numel() for parameter in model.language_model.model.layers.parameters())
    return model.parameter_counts() | {"encoder_positions": positions, "decoder_body": body}


def picture(number: int, tile_size: int) -> Image.Image:
    """3 x 2 tiles and the thumbnail: 7 tiles."""
    pixels = np.random.default_rng(number).integers(0, 256, (2 * tile_size, 3 * tile_size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def work(processor, pictures: int, each: int) -> list[list[dict]]:
    """Conversations: `each` questions about each of `pictures` pictures."""
    images = [picture(number, processor.image_processor.tile_size) for number in range(pictures)]
    asked = questions(pictures * each)
    return [
        [{"role": "user", "content": [{"type": "image", "image": images[index // each]}, {"type": "text", "text": text}]}]
        for index, text in enumerate(asked)
    ]


class StockForGeneration(NemotronHForCausalLM):
    """transformers' model as it is. Its `generate` refuses `inputs_embeds` only because this method does not name them."""

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)


class Stock:
    """Encoder and projector, then `generate` of the stock decoder on batches of `rows` questions, padded on the left."""

    def __init__(self, folder: str, rows: int):
        self.vlm, self.processor = load_model(folder)
        self.decoder = StockForGeneration(self.vlm.config.text_config).eval()
        self.decoder.load_state_dict(self.vlm.language_model.state_dict())
        self.embeddings = self.decoder.get_input_embeddings()
        self.vlm.language_model = None
        self.rows = rows

    @torch.inference_mode()
    def answer(self, conversations: list, new_tokens: int) -> int:
        for start in range(0, len(conversations), self.rows):
            prepared = [self.processor.prepare(each, add_generation_prompt=True) for each in conversations[start : start + self.rows]]
            pixels = self.processor.image_processor.normalize_pixels(torch.cat([each.pixels for each in prepared]))
            batch = self.processor.pad([each.rendered.input_ids for each in prepared])
            embeddings = self.embeddings(batch["input_ids"])
            places = (batch["input_ids"] == self.vlm.config.image_token_id).flatten().nonzero().squeeze(-1)
            visual = self.vlm.projector(self.vlm.vision_encoder.features(pixels)).flatten(0, 1)  # transformers' own encoder forward
            embeddings = embeddings.flatten(0, 1).index_copy(0, places, visual).view_as(embeddings)
            said = self.decoder.generate(
                inputs_embeds=embeddings,
                attention_mask=batch["attention_mask"],
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            assert said.shape == (len(prepared), new_tokens), said.shape
        return len(conversations)


class Ours:
    """The engine, with nothing kept from one call to the next."""

    def __init__(self, folder: str):
        from vlm.engine import Engine, Request

        self.engine, self.request = Engine.from_pretrained(folder), Request
        self.counts: dict[str, float] = {}
        self.processor = self.engine.processor
        # Random weights would never end a turn, but a trained model does: nobody may be ahead by that. (Stock is told min_new_tokens.)
        with torch.no_grad():
            self.engine.model.get_output_embeddings().weight[self.processor.renderer.end_of_turn_id] = 0.0

    def answer(self, conversations: list, new_tokens: int) -> int:
        self.engine.kept.clear()
        answers = self.engine.generate([self.request(each, max_new_tokens=new_tokens) for each in conversations])
        wrong = [answer for answer in answers if answer.error or answer.generated_tokens != new_tokens]
        assert not wrong, wrong[0]
        tokens, shared = (sum(getattr(answer, name) for answer in answers) for name in ("prompt_tokens", "shared_tokens"))
        self.counts = {"prompt_tokens": tokens / len(answers), "computed_tokens": (tokens - shared) / len(answers)}
        return len(answers)


LARGEST_BATCH = 30
WAYS = {"stock one by one": lambda folder: Stock(folder, 1), "stock batched": lambda folder: Stock(folder, LARGEST_BATCH), "engine": Ours}


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    way, folder = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    answering = WAYS[way](folder)
    print(json.dumps({"ready": way, "resident_bytes": resident_bytes()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        conversations = work(answering.processor, order["pictures"], order["each"])[: order["limit"]]
        wall, cpu = time.perf_counter(), time.process_time()
        count = answering.answer(conversations, order["new_tokens"])
        result = {"questions": count, "wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        result |= getattr(answering, "counts", {})
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
