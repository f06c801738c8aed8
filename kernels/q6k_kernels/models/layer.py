"""How layers of transformers' models are put together: their norms, and how their heads rotate.

A row of an architecture chooses among these, and our own decoding step (`generate.step_layers`) follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh", "relu_squared"]
Angles = Literal["halves", "neighbours", "once"]
NormedPart = Literal["head", "projection", "rotated head"]
"""What has a norm: each head before it rotates, all heads together, or each head that has rotated."""


@dataclass(frozen=True)
class LayerNorms:
    """The norms of a layer by transformers' names; "" where there is none.

    Attributes:
        before: norm of what attention sees.
        after_attention: norm of attention's result.
        between: norm of what the feed-forward network sees.
        after: norm of the network's result.
        parallel: whether the network sees what attention sees, rather than its result.
        centred: whether these norms, and the one before the head, subtract the mean.
    """

    before: str = "input_layernorm"
    after_attention: str = ""
    between: str = "post_attention_layernorm"
    after: str = ""
    parallel: bool = False
    centred: bool = False


NORMS_BEFORE = LayerNorms()
NORMS_AROUND = LayerNorms(
    after_attention="post_attention_layernorm",
    between="pre_feedforward_layernorm",
    after="post_feedforward_layernorm",
)
NORMS_AFTER = LayerNorms(
    before="", after_attention="post_attention_layernorm", between="", after="post_feedforward_layernorm"
)


@dataclass(frozen=True)
class HeadNorms:
    """The norms of q and k: transformers' names, and what has one."""

    q: str = "q_norm"
    k: str = "k_norm"
    part: NormedPart = "head"


@dataclass(frozen=True)
class ExpertsForm:
    """Where layers have a mixture of experts, by transformers' names.

    Attributes:
        beside: whether it stands beside the feed-forward network, with norms of its own, in models whose
            configuration says so; or in its place.
        router: name of the router, of a mixture in the network's place.
        biased: whether that router has biases.
        shared: name of the expert that all tokens share, which has a gate; "" if there is none.
    """

    beside: bool = False
    router: str = "gate"
    biased: bool = False
    shared: str = ""


def _always(_: Any) -> bool:
    return True


@dataclass(frozen=True)
class Rotation:
    """How heads rotate.

    Attributes:
        neighbours: whether a value rotates with its neighbour, rather than with the one half the rotated part away.
        angles: how transformers' rotary embedding repeats the angles of pairs: in two halves, so that neighbours
            have the same, or not at all.
        rotates: whether a module of attention rotates its heads.
        axes: numbers of a position: 3 where transformers tells time, height and width apart, equal in a text.
    """

    neighbours: bool = False
    angles: Angles = "halves"
    rotates: Callable[[Any], bool] = _always
    axes: Literal[1, 3] = 1


HALVES_ROTATE = Rotation()
