"""The decoder as the engine runs it: packed prefill and batched decoding on `Slots`, in place and without autograd.

`run_layers` with a `DecoderState` is the obvious way, and the reference in the tests. This one leaves out what only training needs, calls
few operations a step (a small model's step is mostly the calling), computes projections for real tokens only, and writes states where
they stand.

Letters: T packed positions, R rows, D decoder width, S slots, H heads, P head width, G groups, N state, F convolution channels, K taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ReLUSquaredActivation
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMLP

from .attention import HybridAttention
from .decode_step import Step
from .mixer import Mamba2Mixer
from .packed_weights import PackedWeights
from .packing import Packing
from .serving_attention import AttentionServing
from .serving_mamba import MambaServing
from .slots import Common, Slots

__all__ = ["ServingDecoder"]


class _Plain:
    """Anything that keeps nothing between tokens, such as a mixture of experts."""

    def __init__(self, mixer: nn.Module):
        self.mixer = mixer

    def prefill(self, x: Tensor, packing: Packing, slots: Slots, wanted: Tensor | None = None) -> Tensor:
        return self.mixer((x if wanted is None else x.index_select(0, wanted))[None])[0]

    def decode(self, x: Tensor, slots: Slots, step: Step) -> Tensor:
        return self.mixer(x[None])[0]


def _squared_relu_(x: Tensor) -> Tensor:
    """In place: the widest tensor of a block is passed over twice, and no other is made."""
    return x.relu_().square_()


class _FeedForward(_Plain):
    """The dense FFN."""

    def __init__(self, mixer: NemotronHMLP, packed: PackedWeights):
        self.mixer = mixer
        self.up, self.down = packed.of(mixer.up_proj), packed.of(mixer.down_proj)
        self.act = _squared_relu_ if isinstance(mixer.act_fn, ReLUSquaredActivation) else mixer.act_fn

    def prefill(self, x: Tensor, packing: Packing, slots: Slots, wanted: Tensor | None = None) -> Tensor:
        return self.down(self.act(self.up(x if wanted is None else x.index_select(0, wanted))))

    def decode(self, x: Tensor, slots: Slots, step: Step) -> Tensor:
        return self.down(self.act(self.up(x)))


class ServingDecoder:
    """Runs one NemotronHForCausalLM whose mixers were taken over. Its weights are read where they are; on a CPU up to `most_packed_bytes`
    of them are also held in the layout their products like best (packed_weights.py)."""

    def __init__(self, language_model: nn.Module, most_packed_bytes: int = 0):
        self.language_model = language_model
        self.packed = packed = PackedWeights(most_packed_bytes)
        kinds = {Mamba2Mixer: MambaServing, HybridAttention: AttentionServing, NemotronHMLP: _FeedForward}
        self.blocks = []
        for block in language_model.model.layers:
            kind = kinds.get(type(block.mixer))
            self.blocks.append((block.norm, kind(block.mixer, packed) if kind else _Plain(block.mixer)))
        self.head = packed.of(language_model.get_output_embeddings())
        # From the last layer that keeps something on, a token's own row is all that its output depends on.
        self.last_stateful = max((place for place, (_, serving) in enumerate(self.blocks) if not isinstance(serving, _Plain)), default=None)
        self.attention_layers = [serving for _, serving in self.blocks if isinstance(serving, AttentionServing)]

    @property
    def weight(self) -> Tensor:
        """A tensor of the model's dtype, on its device."""
        return self.language_model.get_input_embeddings().weight

    def slots(self, rows: int, span: int, *, with_tails: bool = False) -> Slots:
        """Empty buffers for `rows` sequences of up to `span` tokens. `with_tails`: rows forked from a common one may keep what they read
        instead of a state (tails.py); on a processor, where states are large."""
        return Slots(self.language_model, rows, span, like=self.weight, with_tails=with_tails and self.weight.device.type == "cpu")

    @staticmethod
    def _normed(norm: nn.Module, hidden: Tensor) -> Tensor:
        wide, size = hidden.float(), hidden.shape[-1]
        if wide.is_cuda:
            wide = F.rms_norm(wide, (size,), norm.weight.float(), norm.variance_epsilon)
        else:  # the same in a third of the time, where it is no kernel of its own
            scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(size).add_(norm.variance_epsilon).rsqrt_()
            wide = (wide * scale).mul_(norm.weight.float())
        return wide.to(hidden.dtype)

    @torch.inference_mode()
    def prefill(
        self,
        embeddings: Tensor,
        slots: Slots,
        rows: list[int],
        lengths: list[int],
        *,
        last_only: bool = False,
        commons: list[Common | None] | None = None,
    ) -> Tensor:
        """Segments packed end to end, embeddings (T, D), go on from their `rows`, which are updated; -> hidden states (T, D) after the
        final norm, or with `last_only` those of each segment's last token (segments, D). `embeddings` is used up. `commons`: for each
        row that was just forked without its SSM state (`Slots.fork`) where that stands, None for the others. Raises ValueError when
        lengths, rows and what was read do not fit."""
        slots.settle([row for row in rows if slots.is_tail[row]])
        commons = commons or [None] * len(rows)
        longest = 0 if slots.tails is None else slots.tails.capacity
        as_tails = [common is not None and length < longest for common, length in zip(commons, lengths, strict=True)]
        packing = Packing(lengths, rows, [slots.counts[row] for row in rows], embeddings.device, commons, as_tails)
        ends = [past + length for past, length in zip(packing.past, lengths, strict=True)]
        for row, past, common in zip(rows, packing.past, commons, strict=True):
            if common is not None and common.tokens != past:
                raise ValueError(f"row {row} has read {past} tokens, the row it is to go on from {common.tokens}; fork it anew")
        if packing.total != embeddings.shape[0] or max(ends) > slots.span:
            raise ValueError(
                f"found {embeddings.shape[0]} embeddings for segments of {lengths} tokens ending at {ends}; rows have {slots.span} slots"
            )
        hidden = embeddings
        for place, (norm, serving) in enumerate(self.blocks):
            normed = self._normed(norm, hidden)
            if last_only and place == self.last_stateful:
                hidden = hidden.index_select(0, packing.last)
                hidden.add_(serving.prefill(normed, packing, slots, packing.last))
            else:
                hidden.add_(serving.prefill(normed, packing, slots))
        if last_only and self.last_stateful is None:
            hidden = hidden.index_select(0, packing.last)
        slots.advance(rows, lengths)
        for row, common, as_tail in zip(rows, commons, as_tails, strict=True):
            slots.common[row], slots.is_tail[row] = common or slots.common[row], as_tail
        return self._normed(self.language_model.model.norm_f, hidden)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, slots: Slots, span: int, *, even: bool = False) -> Tensor:
        """tokens (R,) go on from rows 0 to R - 1 -> logits (R, vocabulary) float32. `span`: slots looked at, more than any of these rows
        has used; `even`: all of them have used span - 1. Only the buffers are written (a CUDA graph can hold it): note the tokens by
        `slots.advance` before the next call."""
        rows = tokens.shape[0]
        if slots.tails is not None:
            slots.settle([row for row in range(rows) if slots.is_tail[row] and slots.tail_length(row) == slots.tails.capacity])
        hidden = self.language_model.get_input_embeddings()(tokens)  # R D
        step = Step.of(slots, rows, span, even=even)
        for norm, serving in self.blocks:
            hidden.add_(serving.decode(self._normed(norm, hidden), slots, step))
        return self.logits(self._normed(self.language_model.model.norm_f, hidden))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(R, D) -> (R, vocabulary) float32."""
        return self.head(hidden).float()
