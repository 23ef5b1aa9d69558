"""Write random checkpoints of real shapes for benchmarks/assemble.py: python benchmarks/assemble_checkpoints.py PRESET SHARD_GB FOLDER

A process of its own, so that its memory is not counted; one random block is repeated, because drawing billions of numbers takes longer than
writing them.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from vision_encoders.stored_tensors import StoredTensor  # noqa: E402
from vlm.decoder import preset_config  # noqa: E402
from vlm.decoder.stored_weights import file_shapes  # noqa: E402
from vlm.shard_files import plan_shards, write_shards  # noqa: E402

WIDE = ("A_log", "mixer.D", "dt_bias")
VALUES = torch.randn(4_194_304, generator=torch.Generator().manual_seed(0)) * 0.02
BLOCKS = {dtype: VALUES.to(dtype).view(torch.uint8).numpy().tobytes() for dtype in (torch.float32, torch.bfloat16)}


class Repeated(StoredTensor):
    """The random block, as often as it takes."""

    def blocks(self) -> Iterator[bytes]:
        left, block = self.size_bytes, BLOCKS[self.dtype]
        while left:
            yield block[:left]
            left -= min(left, len(block))


def write_decoder(folder: Path, preset: str, shard_bytes: int) -> None:
    config = preset_config(preset)
    folder.mkdir()
    shapes = file_shapes(config)
    tensors = {key: Repeated(torch.float32 if key.endswith(WIDE) else torch.bfloat16, shape) for key, shape in shapes.items()}
    write_shards(folder, tensors, plan_shards(tensors, shard_bytes))
    fields = config.to_dict()
    for absent in ("layers_block_type", "mtp_layers_block_type"):
        fields.pop(absent, None)
    fields |= {"hybrid_override_pattern": config.hybrid_override_pattern, "time_step_limit": [0.0, math.inf], "torch_dtype": "bfloat16",
               "dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    # As many words as the embeddings have rows, so that the tokens of images need new ones.
    marks = ["<unk>", "<s>", "</s>", "<SPECIAL_14>", "<SPECIAL_15>"]
    words = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"word{number}" for number in range(config.vocab_size - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(marks)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_internvit_300m(folder: Path) -> None:
    """OpenGVLab's InternViT-300M-448px-V2.5: names, shapes, bf16."""
    width, inner, layers, positions = 1024, 4096, 24, 1025
    shapes = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding": (1, positions, width),
    }
    layer = {
        "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
        "mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,), "mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,),
        "ls1": (width,), "ls2": (width,),
    }  # fmt: skip
    shapes |= {f"encoder.layers.{index}.{name}": shape for index in range(layers) for name, shape in layer.items()}
    tensors = {key: Repeated(torch.bfloat16, shape) for key, shape in shapes.items()}
    folder.mkdir()
    write_shards(folder, tensors, plan_shards(tensors))
    config = {
        "model_type": "intern_vit_6b", "hidden_size": width, "num_attention_heads": 16, "num_hidden_layers": layers,
        "intermediate_size": inner, "patch_size": 14, "image_size": 448, "norm_type": "layer_norm", "qk_normalization": False,
        "qkv_bias": True, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    preset, shard_gb, target = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    write_decoder(target / "decoder", preset, int(shard_gb * 1e9))
    write_internvit_300m(target / "encoder")
