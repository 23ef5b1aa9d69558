"""The whole decoder, prefill and decoding, beside plain transformers (stock mixers, same weights) and a Transformer of the same size.

    python benchmarks/decoder.py                     writes benchmarks/results/decoder.{md,json}
    python benchmarks/decoder.py --sizes tiny --rounds 1 --out decoder-result

Two sizes: the tiny preset, and a hybrid body of some 60 M parameters (width 512, 10 Mamba-2, 2 attention and 10 FFN layers). The
Transformer is transformers' Llama of the same width, with as many layers as come nearest to the body's parameters; all weights are random.
Prefill makes the state and the logits of the last position; decoding continues greedily from it, token by token. "engine" is the loop that
vlm.engine answers with, "run_layers" the one that trains and that `generate` uses. All take turns; the best of the rounds counts for each.
No padding, no pictures, no shared prefixes: benchmarks/engine.py has those.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
import transformers  # noqa: E402
from result_files import write_results  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.models.nemotron_h import NemotronHForCausalLM  # noqa: E402

from vlm.decoder import DecoderState, Layout, preset_config, run_layers, take_over_mixers  # noqa: E402
from vlm.decoder.serving import ServingDecoder  # noqa: E402

BODY = {
    "pattern": "M-M-M*-M-M-M-M*-M-M-M-", "hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "chunk_size": 128,
    "vocab_size": 8192,
}  # fmt: skip
SIZES = {"tiny": {}, "60M": BODY}
WAYS = ("engine", "run_layers", "plain transformers", "Transformer")


def body_parameters(model: torch.nn.Module) -> int:
    """All but embedding and output head."""
    return sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)


def build(size: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The three models; the first two hold the same weights."""
    torch.manual_seed(0)
    config = preset_config("tiny", **SIZES[size])
    plain = NemotronHForCausalLM(config)
    for module in plain.modules():  # NVIDIA's code has no clamp from below (docs/decisions.md); without it both compute the same
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
        if hasattr(module, "time_step_min"):
            module.time_step_min = 0.0
    ours = NemotronHForCausalLM(config)
    ours.load_state_dict(plain.state_dict())
    take_over_mixers(ours)
    settings = {
        "hidden_size": config.hidden_size, "intermediate_size": 4 * config.hidden_size, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim, "vocab_size": config.vocab_size,
    }  # fmt: skip
    one, two = (body_parameters(LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **settings))) for layers in (1, 2))
    layers = max(1, round((body_parameters(plain) - one) / (two - one)) + 1)
    rival = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **settings))
    models = {name: model.to(device, dtype).eval() for name, model in zip(WAYS[1:], (ours, plain, rival), strict=True)}
    return {"engine": models["run_layers"]} | models


def _rows(ids: torch.Tensor) -> Layout:
    return Layout.rows([ids.shape[1]] * len(ids), ids.shape[1], ids.device)


class Run:
    """One way through one batch; `prefill` and `step` give logits (B, vocabulary)."""

    def __init__(self, way: str, model, serving: ServingDecoder | None, room: int):
        self.way, self.model, self.serving, self.room = way, model, serving, room

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T)."""
        if self.way == "engine":
            batch, self.seen = ids.shape
            self.slots = self.serving.slots(batch, self.seen + self.room)
            embeddings = self.model.get_input_embeddings()(ids.flatten())
            hidden = self.serving.prefill(embeddings, self.slots, list(range(batch)), [self.seen] * batch, last_only=True)
            return self.serving.logits(hidden)
        if self.way == "run_layers":
            self.state = DecoderState()
            return self.model.lm_head(run_layers(self.model, self.model.get_input_embeddings()(ids), _rows(ids), self.state)[:, -1])
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.state = output.past_key_values
        return output.logits[:, -1]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, 1)."""
        if self.way == "engine":
            self.seen += 1
            logits = self.serving.decode(tokens[:, 0], self.slots, self.seen, even=True)
            self.slots.advance(list(range(len(tokens))), [1] * len(tokens))
            return logits
        if self.way == "run_layers":
            return self.model.lm_head(run_layers(self.model, self.model.get_input_embeddings()(tokens), _rows(tokens), self.state)[:, -1])
        output = self.model(input_ids=tokens, past_key_values=self.state, use_cache=True)
        self.state = output.past_key_values
        return output.logits[:, -1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def timed(run: Run, ids: torch.Tensor, new_tokens: int) -> tuple[float, float, torch.Tensor]:
    """(seconds of the prefill, seconds a decoded token, logits of every step (steps + 1, B, vocabulary))."""
    start = _now(ids.device)
    found = [run.prefill(ids)]
    middle = _now(ids.device)
    for _ in range(new_tokens):
        found.append(run.step(found[-1].argmax(-1, keepdim=True)))
    return middle - start, (_now(ids.device) - middle) / new_tokens, torch.stack(found)


def measure(size: str, options: argparse.Namespace) -> dict:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    models = build(size, device, dtype)
    serving = ServingDecoder(models["engine"], 2**30)
    rows = []
    for batch, length in options.shapes:
        ids = torch.randint(0, models["engine"].config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)
        best = {way: [float("inf"), float("inf")] for way in WAYS}
        logits = {}
        for _ in range(options.rounds + 1):  # the first round warms up; it counts as well, since only the best is kept
            for way, model in models.items():
                filling, decoding, logits[way] = timed(Run(way, model, serving, options.new_tokens), ids, options.new_tokens)
                best[way] = [min(best[way][0], filling), min(best[way][1], decoding)]
        stock = logits["plain transformers"]
        differences = [((logits[way] - stock).abs().max() / stock.abs().max()).item() for way in ("engine", "run_layers")]
        for place, task in enumerate(("prefill", "decode")):
            times = {way: best[way][place] for way in WAYS}
            rows.append({"task": task, "batch": batch, "context": length, "difference": max(differences)} | times)
    return {"size": size, "parameters": {way: body_parameters(model) for way, model in models.items()}, "rows": rows}


def page(result: dict) -> str:
    lines = [
        "# The whole decoder beside plain transformers and a Transformer",
        "",
        f"{result['dtype']} on {result['device']} ({result['machine']}, {result['threads']} threads, torch {result['torch']}, transformers "
        f"{result['transformers']}); the best of {result['rounds'] + 1} rounds, {result['new_tokens']} tokens decoded. Milliseconds: of "
        "the whole prompts, or of one step of all rows. In brackets, how many times the engine's time.",
    ]
    for size in result["sizes"]:
        counts = size["parameters"]
        lines += [
            "",
            f"## {size['size']} (hybrid body {counts['engine'] / 1e6:.2f} M, Transformer {counts['Transformer'] / 1e6:.2f} M)",
            "",
        ]
        lines += [
            "| task | rows x context | engine | run_layers | plain transformers | Transformer | logits, ours to plain |",
            "|" + "---|" * 7,
        ]
        for row in size["rows"]:
            engine, others = row["engine"], [row[way] for way in WAYS[1:]]
            cells = " | ".join(f"{1e3 * other:,.1f} ({other / engine:.1f}x)" for other in others)
            lines.append(
                f"| {row['task']} | {row['batch']} x {row['context']:,} | {1e3 * engine:,.1f} | {cells} | {row['difference']:.0e} |"
            )
    return "\n".join([*lines, "", f"    {result['command']}", ""])


def _shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[(1, 256), (1, 2048), (8, 256)], metavar="ROWSxCONTEXT")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "decoder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {
        "command": " ".join(["python benchmarks/decoder.py", *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name(options.device)
        if options.device.startswith("cuda")
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: getattr(options, name) for name in ("threads", "device", "dtype", "rounds", "new_tokens")},
        "sizes": [measure(size, options) for size in options.sizes],
    }
    write_results(options.out, result, page(result))


if __name__ == "__main__":
    main()
