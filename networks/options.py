"""The `network_args` of `networks.lora_flux`, from strings to typed values.

Kohya hands every value over as a string and ignores what it does not know; here each key has a row with its
reader, an unknown key is refused with the nearest known one, and keys of other network modules that are
often left in shared configs are named once as without effect. Block index lists stay text until the depth
of the model is known (`networks.targets`).
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from library.errors import NetworkPluginError
from library.log import warn_once

logger = logging.getLogger(__name__)

# One entry of network_reg_dims or network_reg_lrs: a regular expression, "=", a number, a comma or the end.
# The expression is taken as short as possible, so it may itself contain commas and equals signs.
_PAIR = re.compile(r"\s*(?P<pattern>.+?)\s*=\s*(?P<value>[-+]?[\d.][\d.eE+-]*)\s*(?:,|$)")
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off", "none"})
_BLOCKS = ("all", "double", "single")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAOptions:
    """Typed `network_args`. `None` in a rank means "network_dim"; a rank of 0 leaves the module alone."""

    img_attn_dim: int | None = None
    txt_attn_dim: int | None = None
    img_mlp_dim: int | None = None
    txt_mlp_dim: int | None = None
    img_mod_dim: int | None = None
    txt_mod_dim: int | None = None
    single_dim: int | None = None
    single_mod_dim: int | None = None
    in_dims: tuple[int, ...] = ()  # img_in, time_in, vector_in, guidance_in, txt_in; empty = none of them
    train_blocks: str = "all"
    train_double_block_indices: str = "all"
    train_single_block_indices: str = "all"
    split_qkv: bool = False
    train_t5xxl: bool = False
    dropout: float = 0.0  # probability of zeroing a rank activation, in [0, 1)
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    target_regex: str | None = None  # ours: of the transformer, only layers with a name it is found in
    exclude_regex: str | None = None  # ours: no layers with a name it is found in
    network_reg_dims: tuple[tuple[str, int], ...] = ()  # (regular expression, rank), first match wins
    network_reg_lrs: tuple[
        tuple[str, float], ...
    ] = ()  # (regular expression, learning rate), first match wins
    ggpo_sigma: float | None = None
    ggpo_beta: float | None = None
    verbose: bool = False
    without_effect: tuple[str, ...] = field(default=())  # keys that were given and do nothing here


def parse_bool(key: str, value: object) -> bool:
    """Read True/true/1/yes/on or their opposites; anything else is a `NetworkPluginError`."""
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise NetworkPluginError(f"network_args {key}={value}: must be True or False")


def _rank(key: str, value: object) -> int:
    try:
        rank = int(str(value))
    except ValueError:
        raise NetworkPluginError(f"network_args {key}={value}: must be a whole number, a rank") from None
    if rank < 0:
        raise NetworkPluginError(
            f"network_args {key}={value}: a rank cannot be negative; 0 leaves these modules out"
        )
    return rank


def _number(key: str, value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise NetworkPluginError(f"network_args {key}={value}: must be a number") from None


def _probability(key: str, value: object) -> float:
    number = _number(key, value)
    if not 0 <= number < 1:
        raise NetworkPluginError(f"network_args {key}={value}: must be at least 0 and below 1")
    return number


def _text(_key: str, value: object) -> str:
    return str(value).strip()


def _blocks(key: str, value: object) -> str:
    text = str(value).strip()
    if text not in _BLOCKS:
        raise NetworkPluginError(f"network_args {key}={value}: must be one of {', '.join(_BLOCKS)}")
    return text


def _in_dims(key: str, value: object) -> tuple[int, ...]:
    ranks = tuple(_rank(key, part.strip()) for part in str(value).strip().strip("[]()").split(","))
    if len(ranks) != 5:
        raise NetworkPluginError(
            f"network_args {key}={value}: needs 5 ranks, for img_in, time_in, vector_in, guidance_in, txt_in"
        )
    return ranks


def _expression(key: str, value: object) -> str:
    text = str(value).strip()
    try:
        re.compile(text)
    except re.error as error:
        raise NetworkPluginError(f"network_args {key}: {text!r} is no regular expression: {error}") from None
    return text


def _pairs(key: str, value: object) -> tuple[tuple[str, str], ...]:
    text, position, pairs = str(value).strip().rstrip(","), 0, []
    while position < len(text):
        match = _PAIR.match(text, position)
        if match is None:
            raise NetworkPluginError(
                f"network_args {key}: {text[position:]!r} is not of the form regex=number"
            )
        pairs.append((_expression(key, match["pattern"]), match["value"]))
        position = match.end()
    return tuple(pairs)


def _reg_dims(key: str, value: object) -> tuple[tuple[str, int], ...]:
    return tuple((pattern, _rank(key, number)) for pattern, number in _pairs(key, value))


def _reg_lrs(key: str, value: object) -> tuple[tuple[str, float], ...]:
    return tuple((pattern, _number(key, number)) for pattern, number in _pairs(key, value))


READERS: Mapping[str, Callable[[str, object], object]] = {
    "img_attn_dim": _rank,
    "txt_attn_dim": _rank,
    "img_mlp_dim": _rank,
    "txt_mlp_dim": _rank,
    "img_mod_dim": _rank,
    "txt_mod_dim": _rank,
    "single_dim": _rank,
    "single_mod_dim": _rank,
    "in_dims": _in_dims,
    "train_blocks": _blocks,
    "train_double_block_indices": _text,
    "train_single_block_indices": _text,
    "split_qkv": parse_bool,
    "train_t5xxl": parse_bool,
    "dropout": _probability,
    "rank_dropout": _probability,
    "module_dropout": _probability,
    "loraplus_lr_ratio": _number,
    "loraplus_unet_lr_ratio": _number,
    "loraplus_text_encoder_lr_ratio": _number,
    "target_regex": _expression,
    "exclude_regex": _expression,
    "network_reg_dims": _reg_dims,
    "network_reg_lrs": _reg_lrs,
    "ggpo_sigma": _number,
    "ggpo_beta": _number,
    "verbose": parse_bool,
}

# conv_*: FLUX has no convolution. The rest are LyCORIS's and SD modules' settings, left in by GUIs.
WITHOUT_EFFECT = frozenset(
    {
        "conv_dim", "conv_alpha", "preset", "use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp",
        "block_size", "rank_dropout_scale", "train_norm", "unbalanced_factorization", "constraint",
        "rescaled", "block_dims", "block_alphas", "down_lr_weight", "mid_lr_weight", "up_lr_weight",
        "block_lr_zero_threshold",
    }
)  # fmt: skip
# Where empty text has a meaning of its own: no block at all.
_EMPTY_MEANS_NONE = frozenset({"train_double_block_indices", "train_single_block_indices"})


# LyCORIS's: harmless when switched off, a misunderstanding when switched on.
_LYCORIS = frozenset(
    {
        "algo",
        "factor",
        "dora_wd",
        "use_scalar",
        "decompose_both",
        "full_matrix",
        "bypass_mode",
        "rs_lora",
        "wd_on_output",
    }
)


def _unknown(key: str) -> NetworkPluginError:
    if key in _LYCORIS:
        return NetworkPluginError(
            f"network_args {key} is a LyCORIS argument; give network_module = lycoris.kohya"
        )
    near = difflib.get_close_matches(key, [*READERS, *WITHOUT_EFFECT], n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(READERS)}"
    return NetworkPluginError(f"network_args {key} is unknown to networks.lora_flux; {hint}")


def parse(arguments: Mapping[str, object]) -> LoRAOptions:
    """Read Kohya's keyword arguments (strings, or typed values, or None for "not given") into `LoRAOptions`.

    Raises `NetworkPluginError` for an unknown key, a value that cannot be read, or only half of the GGPO
    pair.
    """
    values: dict[str, object] = {}
    idle: list[str] = []
    for key, value in arguments.items():
        if key in WITHOUT_EFFECT or (key in _LYCORIS and str(value).strip().lower() in _FALSE):
            idle.append(key)
        elif key not in READERS:
            raise _unknown(key)
        elif value is not None and (str(value).strip() or key in _EMPTY_MEANS_NONE):
            values[key] = READERS[key](key, value)
    if idle:
        warn_once(logger, "network_args without effect on networks.lora_flux: %s", ", ".join(sorted(idle)))
    if ("ggpo_sigma" in values) != ("ggpo_beta" in values):
        raise NetworkPluginError(
            "network_args: ggpo_sigma and ggpo_beta only work together; give both or neither"
        )
    # READERS gives each field its type, which a mapping of values cannot say.
    return LoRAOptions(**values, without_effect=tuple(sorted(idle)))  # type: ignore[arg-type]
