"""A model's sizes as far as bytes and FLOPs depend on them, from its transformers configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loop.errors import UserError
from loop.model import checkpoint_folder
from loop.shapes import SHAPES, is_tiny

TINY_VOCABULARY = 4096  # of the tokenizer that the loop trains, which a tiny shape takes its vocabulary from
NORMED, PLAIN, HYBRID = ("qwen3",), ("llama", "mistral", "qwen2"), ("qwen3_5_text",)


@dataclass(frozen=True)
class Linear:
    """A projection without its bias: name by the last part, as adapters' targets are given."""

    name: str
    fan_in: int
    fan_out: int


@dataclass(frozen=True)
class Attention:
    """One layer of attention: `rotary` of `width` numbers a head are rotated; normed: query and key heads by RMSNorm;
    gated: its output by a sigmoid, whose argument comes out of q_proj; window: how far back it sees, None for all."""

    heads: int
    key_heads: int
    width: int
    rotary: int
    normed: bool
    gated: bool
    window: int | None


@dataclass(frozen=True)
class Delta:
    """One gated-delta layer: key heads of `key_width`, value heads of `value_width`."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int

    @property
    def values(self) -> int:
        return self.value_heads * self.value_width

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_width + self.values


@dataclass(frozen=True)
class Shape:
    """A causal language model. kinds: "attention" or "delta" of every layer, in order. delta: None without such layers."""

    hidden: int
    intermediate: int
    vocabulary: int
    tied: bool
    zero_centred: bool
    kinds: tuple[str, ...]
    attention: Attention
    delta: Delta | None

    def layers(self, kind: str) -> int:
        return self.kinds.count(kind)

    def mixer_inputs(self, kind: str) -> tuple[Linear, ...]:
        """The projections that read a layer's normed input, before its attention or delta rule."""
        D, a, d = self.hidden, self.attention, self.delta
        if kind == "attention":
            query, key = a.heads * a.width, a.key_heads * a.width
            return Linear("q_proj", D, query * (2 if a.gated else 1)), Linear("k_proj", D, key), Linear("v_proj", D, key)
        sizes = (("in_proj_qkv", d.channels), ("in_proj_z", d.values), ("in_proj_b", d.value_heads))
        return tuple(Linear(name, D, size) for name, size in (*sizes, ("in_proj_a", d.value_heads)))

    def mixer_output(self, kind: str) -> tuple[Linear, ...]:
        if kind == "attention":
            return (Linear("o_proj", self.attention.heads * self.attention.width, self.hidden),)
        return (Linear("out_proj", self.delta.values, self.hidden),)

    @property
    def mlp_inputs(self) -> tuple[Linear, ...]:
        return Linear("gate_proj", self.hidden, self.intermediate), Linear("up_proj", self.hidden, self.intermediate)

    @property
    def mlp_output(self) -> tuple[Linear, ...]:
        return (Linear("down_proj", self.intermediate, self.hidden),)

    def projections(self) -> list[tuple[Linear, int]]:
        """Every projection of the layers, and how many layers have it."""
        found = [(linear, len(self.kinds)) for linear in (*self.mlp_inputs, *self.mlp_output)]
        for kind in dict.fromkeys(self.kinds):
            found += [(linear, self.layers(kind)) for linear in (*self.mixer_inputs(kind), *self.mixer_output(kind))]
        return found

    def weights(self) -> int:
        """Numbers in all matrices, an embedding that is the head's counted once. Norms and other vectors are left out."""
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        convolution = self.layers("delta") * 4 * self.delta.channels if self.delta else 0
        return tables + convolution + sum(linear.fan_in * linear.fan_out * count for linear, count in self.projections())


def shape_of(model: str) -> Shape:
    """The shape of a named model or of a folder with a config.json. Raises UserError for a model that is neither, or of a
    type whose layers are not known here."""
    config = _config(model)
    if config.model_type not in (*NORMED, *PLAIN, *HYBRID):
        known = ", ".join((*NORMED, *PLAIN, *HYBRID))
        raise UserError(f"--model {model}: the layers of a {config.model_type} model are not known here; known are {known}")
    hybrid = config.model_type in HYBRID
    kinds = tuple("delta" if kind == "linear_attention" else "attention" for kind in _layer_types(config))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    normed = hybrid or config.model_type in NORMED
    return Shape(
        hidden=config.hidden_size, intermediate=config.intermediate_size, tied=config.tie_word_embeddings,
        vocabulary=TINY_VOCABULARY if model in SHAPES and is_tiny(model) else config.vocab_size,
        zero_centred=hybrid, kinds=kinds, delta=_delta(config) if "delta" in kinds else None,
        attention=Attention(
            config.num_attention_heads, config.num_key_value_heads, width, int(width * rotated), normed, hybrid,
            getattr(config, "sliding_window", None),
        ),
    )  # fmt: skip


def _config(model: str) -> Any:
    from transformers import AutoConfig

    folder = checkpoint_folder(model)
    if folder is None:
        model_type, values = SHAPES[model]
        return AutoConfig.for_model(model_type, **values)
    try:
        return AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {folder}: its configuration can't be read: {str(error).splitlines()[0]}") from error


def _layer_types(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def _delta(config: Any) -> Delta:
    return Delta(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
