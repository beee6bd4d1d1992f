"""Which Linear layers get an adapter, of which rank, and under which name in the file.

Layers are found by walking the model that is given: blocks by class name (the interface Kohya's modules and
LyCORIS share), layers by type. No depth or width is assumed, so pruned and tiny models work. Weights are
never read, so a model on the meta device will do. Names are Kohya's: prefix, then the module's path with
dots as underscores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from library.errors import NetworkPluginError
from networks.names import diffusers_names
from networks.options import LoRAOptions

UNET = "lora_unet"
CLIP_L = "lora_te1"
T5 = "lora_te3"

DOUBLE = "DoubleStreamBlock"
SINGLE = "SingleStreamBlock"
INPUT_LAYERS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")  # the order of in_dims
# Position in the list of text encoders -> file prefix and the classes whose Linear layers are taken.
TEXT_ENCODERS: tuple[tuple[str, frozenset[str]], ...] = (
    (CLIP_L, frozenset({"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"})),
    (T5, frozenset({"T5Attention", "T5DenseGatedActDense"})),
)
_BLOCK_CLASSES: Mapping[str, tuple[str, ...]] = {
    "all": (DOUBLE, SINGLE),
    "double": (DOUBLE,),
    "single": (SINGLE,),
}
_DOUBLE_GROUPS = ("img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One Linear that could be adapted. `block` is the class name of its block, "" outside blocks."""

    prefix: str  # UNET, CLIP_L or T5
    path: str  # module path inside its model, with dots
    linear: nn.Linear
    block: str = ""
    index: int = 0  # position among the blocks of its class, counted from 0
    depth: int = 0  # how many blocks of its class the model has
    input_layer: int | None = None  # position in INPUT_LAYERS

    @property
    def name(self) -> str:
        """The name in adapter files, such as lora_unet_double_blocks_0_img_attn_qkv."""
        return f"{self.prefix}_{self.path}".replace(".", "_")

    def is_called(self, pattern: str) -> bool:
        """Whether a regular expression is found in one of its names: Kohya's, Black Forest Labs', diffusers'."""
        return any(re.search(pattern, name) for name in (self.name, self.path, *diffusers_names(self.path)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One Linear to adapt."""

    candidate: Candidate
    rank: int  # of each part, when split
    parts: tuple[
        int, ...
    ] = ()  # output rows of each part (q, k, v and, in single blocks, mlp); () = not split


RankRule = Callable[[Candidate], int]


def candidates(
    transformer: nn.Module, text_encoders: Sequence[nn.Module], *, blocks: str = "all", t5: bool
) -> Iterator[Candidate]:
    """Every Linear that can be adapted, in Kohya's order of creation: CLIP-L, T5, blocks, input layers.

    `blocks` is "all", "double" or "single"; T5 is walked only when `t5` is set.
    """
    for encoder, (prefix, classes) in zip(text_encoders, TEXT_ENCODERS, strict=False):
        if prefix == T5 and not t5:
            continue
        for _, path, linear in _linears_under(encoder, classes):
            yield Candidate(prefix=prefix, path=path, linear=linear)
    yield from _block_candidates(transformer, _BLOCK_CLASSES[blocks])
    for position, layer in enumerate(INPUT_LAYERS):
        for path, module in transformer.named_modules():
            if path.split(".")[0] == layer and isinstance(module, nn.Linear):
                yield Candidate(prefix=UNET, path=path, linear=module, input_layer=position)


def _linears_under(root: nn.Module, classes: Collection[str]) -> Iterator[tuple[str, str, nn.Linear]]:
    """(path of the owner, path of the Linear, the Linear) for every module of one of `classes`."""
    for owner_path, owner in root.named_modules():
        if type(owner).__name__ in classes:
            for child_path, child in owner.named_modules():
                if isinstance(child, nn.Linear):
                    yield owner_path, f"{owner_path}.{child_path}" if owner_path else child_path, child


def _block_candidates(transformer: nn.Module, classes: Sequence[str]) -> Iterator[Candidate]:
    kinds = {path: type(module).__name__ for path, module in transformer.named_modules()}
    positions: dict[str, int] = {}
    depths: dict[str, int] = {}
    for path, kind in kinds.items():
        if kind in (DOUBLE, SINGLE):
            positions[path] = depths.get(kind, 0)
            depths[kind] = positions[path] + 1
    for owner, path, linear in _linears_under(transformer, classes):
        yield Candidate(
            prefix=UNET,
            path=path,
            linear=linear,
            block=kinds[owner],
            index=positions[owner],
            depth=depths[kinds[owner]],
        )


def parse_indices(key: str, text: str, depth: int) -> frozenset[int]:
    """Read "all", "none", "" or a list like "0,1,8-12" into block numbers in [0, depth).

    Raises `NetworkPluginError` for text that is no such list or a number the model does not have.
    """
    if text == "all":
        return frozenset(range(depth))
    if text in ("", "none"):
        return frozenset()
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise NetworkPluginError(
                f"network_args {key}={text}: {part!r} is neither a block number nor a range a-b"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= depth:
            raise NetworkPluginError(
                f"network_args {key}={text}: {part.strip()!r} is outside this model's blocks 0 to {depth - 1}"
            )
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


def rank_rule(options: LoRAOptions, *, dim: int) -> RankRule:
    """The rank of each candidate by `network_args`: name, regular expression, block selection, type.

    A rank of 0 means the layer is left alone. `dim` is network_dim.
    """
    selections = {
        DOUBLE: ("train_double_block_indices", options.train_double_block_indices),
        SINGLE: ("train_single_block_indices", options.train_single_block_indices),
    }

    def rule(candidate: Candidate) -> int:
        if candidate.prefix == UNET and not _is_wanted(options, candidate):
            return 0
        for pattern, rank in options.network_reg_dims:
            if re.search(pattern, candidate.name):
                return rank
        if candidate.input_layer is not None:
            return options.in_dims[candidate.input_layer] if options.in_dims else 0
        if candidate.block:
            key, text = selections[candidate.block]
            if candidate.index not in parse_indices(key, text, candidate.depth):
                return 0
        return _type_rank(options, candidate, dim)

    return rule


def _is_wanted(options: LoRAOptions, candidate: Candidate) -> bool:
    """By target_regex and exclude_regex, which narrow what the other arguments choose in the transformer."""
    wanted, unwanted = options.target_regex, options.exclude_regex
    return (wanted is None or candidate.is_called(wanted)) and not (
        unwanted is not None and candidate.is_called(unwanted)
    )


def _type_rank(options: LoRAOptions, candidate: Candidate, dim: int) -> int:
    """network_dim, or the rank that `network_args` give to this kind of layer."""
    by_group: Mapping[str, int | None] = {
        "img_attn": options.img_attn_dim,
        "txt_attn": options.txt_attn_dim,
        "img_mlp": options.img_mlp_dim,
        "txt_mlp": options.txt_mlp_dim,
        "img_mod": options.img_mod_dim,
        "txt_mod": options.txt_mod_dim,
    }
    chosen: int | None = None
    if candidate.block == DOUBLE:
        group = next((name for name in _DOUBLE_GROUPS if name in candidate.path), "")
        chosen = by_group.get(group)
    elif candidate.block == SINGLE:
        chosen = options.single_mod_dim if "modulation" in candidate.path else options.single_dim
    return dim if chosen is None else chosen


def split_rows(candidate: Candidate) -> tuple[int, ...]:
    """Output rows of q, k, v (and mlp) in a fused projection, or () for any other layer.

    The width of q is read off the layer: its input is as wide as the model, and so are q, k and v.
    """
    width, rows = candidate.linear.in_features, candidate.linear.out_features
    if candidate.block == DOUBLE and candidate.path.endswith("_attn.qkv"):
        return (width, width, width)
    if candidate.block == SINGLE and candidate.path.endswith(".linear1"):
        return (width, width, width, rows - 3 * width)
    return ()


def select(found: Iterator[Candidate], rule: RankRule, *, split_qkv: bool) -> list[Target]:
    """The targets among `found`: those with a rank above 0."""
    targets = []
    for candidate in found:
        rank = rule(candidate)
        if rank > 0:
            parts = split_rows(candidate) if split_qkv else ()
            targets.append(Target(candidate=candidate, rank=rank, parts=parts))
    return targets


def check_names(options: LoRAOptions, targets: Sequence[Target]) -> None:
    """Raise if target_regex and exclude_regex leave nothing of the transformer, as a misspelt name does."""
    given = {"target_regex": options.target_regex, "exclude_regex": options.exclude_regex}
    shown = " ".join(f"{key}={value}" for key, value in given.items() if value is not None)
    if shown and not any(target.candidate.prefix == UNET for target in targets):
        raise NetworkPluginError(
            f"network_args {shown} leaves no layer of this transformer; a layer is called "
            "lora_unet_single_blocks_0_linear2, single_blocks.0.linear2 or "
            "transformer.single_transformer_blocks.0.proj_out"
        )


def check_block_indices(options: LoRAOptions, transformer: nn.Module) -> None:
    """Raise for a block list the model cannot satisfy, also where no layer would come to ask."""
    names = [type(module).__name__ for module in transformer.modules()]
    parse_indices("train_double_block_indices", options.train_double_block_indices, names.count(DOUBLE))
    parse_indices("train_single_block_indices", options.train_single_block_indices, names.count(SINGLE))
