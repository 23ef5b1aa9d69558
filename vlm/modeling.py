"""The vision-language model: tiles -> features -> visual tokens -> put in place -> hybrid decoder -> loss or logits.

A transformers model like any other (from_pretrained, save_pretrained, generate), whose decoder is transformers' own
NemotronHForCausalLM with our mixers set on it. Training options (precision, checkpointing, freezing) are applied from outside.

Letters: B batch, T positions, N tiles, P patches, V visual tokens per tile, C vision width, D decoder width, K supervised positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.nemotron_h import NemotronHForCausalLM
from transformers.utils import ModelOutput

from projector import Projector
from vision_encoders import build_vision_encoder
from vision_encoders.running_statistics import unmoved_statistics

from .adapter_names import refuse_adapters
from .configuration import VLMConfig
from .decoder.layers import run_layers, take_over_mixers
from .decoder.layout import Layout
from .decoder.state import DecoderState
from .loss import supervised_loss

__all__ = ["VLMOutput", "VisionLanguageModel"]


@dataclass
class VLMOutput(ModelOutput):
    """loss: scalar; token_losses (K,) and token_places (K,): per supervised position, in the flattened batch; logits (B, T', vocabulary)
    float32; past_key_values: a DecoderState."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: DecoderState | None = None
    token_losses: Tensor | None = None
    token_places: Tensor | None = None


class VisionLanguageModel(PreTrainedModel, GenerationMixin):
    """Children: `vision_encoder`, `projector`, `language_model`."""

    config_class = VLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True
    _no_split_modules = ["NemotronHBlock"]
    # Searched in the names of weights by from_pretrained: float32 also when all else is opened in half precision. A_log rounded to
    # bfloat16 is another decay; the router's bias comes along from transformers' own list.
    _keep_in_fp32_modules_strict = ["mixer.A_log", "mixer.D$", "mixer.dt_bias"]

    def __init__(self, config: VLMConfig, vision_encoder=None, language_model=None):
        super().__init__(config)
        encoder_settings = config.vision_config.encoder
        if vision_encoder is None:
            if not encoder_settings:
                raise ValueError(
                    "config.vision_config.encoder is empty; expected {'name': ..., settings}; make a model by python -m vlm.assemble"
                )
            vision_encoder = build_vision_encoder(**encoder_settings)
        if vision_encoder.hidden_size != config.vision_config.hidden_size:
            raise ValueError(
                f"the vision encoder is {vision_encoder.hidden_size} wide; the configuration says {config.vision_config.hidden_size}"
            )
        self.vision_encoder = vision_encoder
        self.projector = Projector(
            config.vision_config.hidden_size,
            config.projector_hidden_size,
            config.text_config.hidden_size,
            pixel_shuffle_factor=config.pixel_shuffle_factor,
            activation=config.projector_activation,
        )
        self.language_model = NemotronHForCausalLM(config.text_config) if language_model is None else language_model
        take_over_mixers(self.language_model)
        self.gradient_checkpointing = False  # transformers' name for activation checkpointing, of the decoder
        self.post_init()

    def _init_weights(self, module):
        # Each part initialises itself when it is built (the encoder by its own library, the decoder by transformers); a second pass
        # here would overwrite what those libraries chose.
        pass

    def init_weights(self):
        pass

    @classmethod
    def from_pretrained(cls, *arguments, **settings):
        """As transformers' own, and the encoder's computed tables (rotary embeddings of some timm towers) are made again.

        They are in no checkpoint; transformers leaves uninitialised memory in their place.
        """
        result = super().from_pretrained(*arguments, **settings)
        model = result[0] if isinstance(result, tuple) else result
        saved = model.vision_encoder.state_dict().keys()
        tables = {name: buffer for name, buffer in model.vision_encoder.named_buffers() if name not in saved}
        if tables:
            with torch.random.fork_rng():
                fresh = dict(build_vision_encoder(**model.config.vision_config.encoder).named_buffers())
            for name, buffer in tables.items():
                buffer.copy_(fresh[name])
        return result

    def save_pretrained(self, *arguments, **settings):
        """As transformers' own. Raises ValueError when adapters were put into the layers (vlm.lora): their names fit no plain model."""
        if not getattr(self, "_hf_peft_config_loaded", False):  # adapters that transformers put in itself it saves alone
            given = settings.get("state_dict")
            refuse_adapters(self.state_dict() if given is None else given)
        return super().save_pretrained(*arguments, **settings)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, every_n_layers: int = 1, offload: bool = False):
        """Of the decoder, keep the inputs of blocks only and compute the rest again in the backward pass. Raises ValueError for the ways
        of transformers in which this model cannot: not every layer, activations on the host, settings of torch's checkpoint."""
        settings = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if settings != {"use_reentrant": False} or every_n_layers != 1 or offload:
            raise ValueError(
                f"activation checkpointing: found {settings}, {every_n_layers = }, {offload = }; expected use_reentrant=False of every "
                "layer, without offload"
            )
        self.gradient_checkpointing = True

    def activation_checkpointing_disable(self):
        self.gradient_checkpointing = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, every_n_layers: int = 1, offload: bool = False):
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self):
        self.activation_checkpointing_disable()

    def encode_tiles(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, H, W), normalised -> visual tokens (N, V, D)."""
        features = self.vision_encoder(pixel_values.to(next(self.vision_encoder.parameters()).dtype))  # N P C
        return self.projector(features.to(next(self.projector.parameters()).dtype))  # N V D

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None, visual_tokens: Tensor | None = None) -> Tensor:
        """input_ids (B, T) and tiles in reading order over the batch -> embeddings (B, T, D).

        Give `pixel_values` (N, 3, H, W) or ready `visual_tokens` (N, V, D). Raises ValueError when placeholders and visual tokens differ
        in number.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if visual_tokens is None and pixel_values is not None and len(pixel_values):
            visual_tokens = self.encode_tiles(pixel_values)
        places = (input_ids == self.config.image_token_id).flatten().nonzero().squeeze(-1)
        found = 0 if visual_tokens is None else visual_tokens.shape[0] * visual_tokens.shape[1]
        if len(places) != found:
            raise ValueError(
                f"found {len(places)} image placeholders in input_ids for {found} visual tokens "
                f"({self.config.visual_tokens_per_tile} per tile); render text and tiles with the same processor"
            )
        if found:
            flat = visual_tokens.flatten(0, 1).to(embeddings.dtype)
            embeddings = embeddings.flatten(0, 1).index_copy(0, places, flat).view_as(embeddings)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: DecoderState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        pixels_are_blank: bool = False,
        **kwargs,
    ) -> VLMOutput:
        """input_ids (B, T), pixel_values (N, 3, H, W) of all tiles in reading order, attention_mask (B, T).

        Packed samples: one row, with any of transformers' padding-free arguments: `seq_idx` (1, T), `cu_seq_lens_q` (S + 1,), or
        `position_ids` (1, T) that restart at 0. With `labels` (not shifted) the loss is the sum over supervised tokens divided by
        `num_items_in_batch` (their number in this batch when None), and no logits are made. Otherwise logits of the last
        `logits_to_keep` positions (0: all). `pixels_are_blank`: the tiles belong to no image and are encoded for nothing but equal work on
        every rank; no running statistics move. With `use_cache` the state is returned as `past_key_values` and continued by the next call.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None and pixels_are_blank:
            with unmoved_statistics(self.vision_encoder):
                inputs_embeds = self.embed(input_ids) + 0.0 * self.encode_tiles(pixel_values).sum()
        elif inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        batch, length, _ = inputs_embeds.shape
        layout = self._layout(batch, length, attention_mask, seq_idx, cu_seq_lens_q, position_ids, past_key_values, inputs_embeds.device)
        state = past_key_values
        if use_cache and state is None:
            state = DecoderState()
        left_padding = 0
        if state is not None and not layout.right_padded:
            # A kept state wants text at the left edge of its row; turn left padding into right padding.
            shifts = length - torch.tensor(layout.lengths, device=inputs_embeds.device)
            rows = (torch.arange(length, device=inputs_embeds.device)[None] + shifts[:, None]) % length
            inputs_embeds = inputs_embeds.gather(1, rows[..., None].expand_as(inputs_embeds))
            layout, left_padding = Layout.rows(layout.lengths, length, inputs_embeds.device), shifts
        hidden = run_layers(
            self.language_model, inputs_embeds, layout, state, activation_checkpointing=self.gradient_checkpointing and self.training
        )
        if isinstance(left_padding, Tensor):
            rows = (torch.arange(length, device=hidden.device)[None] - left_padding[:, None]) % length
            hidden = hidden.gather(1, rows[..., None].expand_as(hidden))
        head = self.get_output_embeddings()
        if labels is not None:
            losses, places = supervised_loss(hidden, head, labels, layout.seq_idx)
            count = num_items_in_batch if num_items_in_batch is not None else max(len(places), 1)
            return VLMOutput(loss=losses.sum() / count, token_losses=losses.detach(), token_places=places, past_key_values=state)
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        return VLMOutput(logits=head(hidden).float(), past_key_values=state)

    @staticmethod
    def _layout(batch, length, attention_mask, seq_idx, cu_seq_lens, position_ids, state, device) -> Layout:
        lengths = None
        if cu_seq_lens is not None:
            lengths = cu_seq_lens.diff().tolist()
        elif seq_idx is not None:
            lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        elif position_ids is not None and state is None and batch == 1 and attention_mask is None:
            starts = (position_ids[0] == 0).nonzero().squeeze(-1).tolist()
            if len(starts) > 1:
                lengths = [end - start for start, end in zip(starts, starts[1:] + [length], strict=True)]
        if lengths is not None:
            if batch != 1:
                raise ValueError(f"packed arguments with {batch} rows; expected one row of packed samples")
            return Layout.packed(lengths, device)
        if state is not None and state.seen_tokens:
            attention_mask = attention_mask[:, -length:] if attention_mask is not None else None
        return Layout.from_mask(attention_mask, batch, length)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # transformers' cache cannot fork recurrent states; `forward` makes a DecoderState

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, pixel_values=None, **kwargs):
        inputs = {"past_key_values": past_key_values, "use_cache": kwargs.get("use_cache", True), "logits_to_keep": 1}
        if past_key_values is not None and past_key_values.seen_tokens:
            seen = past_key_values.seen_tokens
            inputs["input_ids"] = input_ids[:, seen:] if input_ids.shape[1] > seen else input_ids[:, -1:]
            return inputs
        return inputs | {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, pixel_values=None, **kwargs):
        """For beams and several returned sequences: rows are repeated side by side, so each row's tiles must be repeated together."""
        if pixel_values is not None and expand_size > 1:
            placeholders = (input_ids == self.config.image_token_id).sum(-1)
            tiles = pixel_values.split((placeholders // self.config.visual_tokens_per_tile).tolist())
            pixel_values = torch.cat([group for group in tiles for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | {"pixel_values": pixel_values}

    @torch.no_grad()
    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part."""
        return {
            name: sum(p.numel() for p in getattr(self, name).parameters()) for name in ("vision_encoder", "projector", "language_model")
        }
