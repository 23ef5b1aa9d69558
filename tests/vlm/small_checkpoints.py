"""Small checkpoints of decoders and encoders as their publishers would write them: NVIDIA's layout, transformers', OpenGVLab's; with a
tokenizer that knows nothing of images."""

import json
from pathlib import Path

import torch
from nvidia_layout import MIXTURE, nvidia_config, nvidia_weights
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import NemotronHForCausalLM, PreTrainedTokenizerFast

from vlm.decoder.presets import preset_config

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 24, "mamba_num_heads": 4}
WIDE = ("A_log", "D", "dt_bias", "e_score_correction_bias")
NVIDIA_MARKS = ["<unk>", "<s>", "</s>", "<SPECIAL_14>", "<SPECIAL_15>", "<SPECIAL_233>"]
THINKING_TEMPLATE = (
    "<s>{% for m in messages %}<SPECIAL_14>{{ m['role'] }}\n{{ m['content'] }}<SPECIAL_15>\n{% endfor %}"
    "{% if add_generation_prompt %}<SPECIAL_14>assistant\n"
    "{{ '<think>\n' if enable_thinking | default(true) else '<think></think>' }}{% endif %}"
)


def small_tokenizer(marks=tuple(NVIDIA_MARKS), chat_template=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(marks) + 270, special_tokens=list(marks), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["a red circle is left of a blue square"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=marks[1], eos_token=marks[2], chat_template=chat_template)


def small_decoder(tokenizer, pattern="ME*-M", seed=0) -> NemotronHForCausalLM:
    """Every kind of layer; matrices bfloat16, what the scan and the router use float32; nothing at its initial value."""
    torch.manual_seed(seed)
    config = preset_config("tiny", pattern=pattern, vocab_size=len(tokenizer), **WIDTHS, **MIXTURE)
    decoder = NemotronHForCausalLM(config).eval()
    for tensor in decoder.state_dict().values():
        tensor.uniform_(-0.2, 0.2)
    decoder.to(torch.bfloat16)
    for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
        if name.endswith(WIDE):
            tensor.data = tensor.data.float() * 1.0001
    return decoder


def write_nvidia(folder: Path, decoder, tokenizer, *, shards=3, **changes) -> Path:
    """Config, shards and extra files as on NVIDIA's pages."""
    config = nvidia_config(decoder) | changes
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_nemotron_h.py").write_text("raise SystemExit('code beside the weights is not run')\n")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: nvidia-open-model-license\n---\n# Model\n")
    (folder / "LICENSE").write_text("terms\n")
    weights = nvidia_weights(decoder)
    names = sorted(weights)
    index = {}
    for shard in range(shards):
        part = {name: weights[name] for name in names[shard::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def write_transformers(folder: Path, decoder, tokenizer, **settings) -> Path:
    decoder.save_pretrained(folder, **settings)
    tokenizer.save_pretrained(folder)
    return folder


def write_internvit(folder: Path, *, dtype=torch.bfloat16, width=24, positions=16, shards=1) -> Path:
    """OpenGVLab's format: LayerNorm, packed qkv; 32 px tiles of 8 px patches."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype)

    weights = {
        "embeddings.class_embedding": draw(1, 1, width),
        "embeddings.patch_embedding.weight": draw(width, 3, 8, 8),
        "embeddings.patch_embedding.bias": draw(width),
        "embeddings.position_embedding": draw(1, positions + 1, width),
    }
    for index in range(2):
        layer = {
            "attn.qkv.weight": draw(3 * width, width), "attn.qkv.bias": draw(3 * width), "attn.proj.weight": draw(width, width),
            "attn.proj.bias": draw(width), "norm1.weight": draw(width), "norm1.bias": draw(width), "norm2.weight": draw(width),
            "norm2.bias": draw(width), "mlp.fc1.weight": draw(40, width), "mlp.fc1.bias": draw(40), "mlp.fc2.weight": draw(width, 40),
            "mlp.fc2.bias": draw(width), "ls1": draw(width), "ls2": draw(width),
        }  # fmt: skip
        weights |= {f"encoder.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    config = {
        "model_type": "intern_vit_6b", "hidden_size": width, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 40,
        "patch_size": 8, "image_size": 32, "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True,
    }  # fmt: skip
    folder.mkdir(parents=True)
    names = sorted(weights)
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in names[shard::shards]}, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
