"""What does not go together with DeepSpeed's ZeRO, as one table: checked before anything is loaded, shown in the docs.

ZeRO 1 to 3 step the optimizer on flat pieces of many parameters, one piece a rank. That is the same computation
for optimizers that treat each number on its own, and another one for those that look at a whole matrix, at the
norm of one, or quantise state in blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from library.config.train_config import TrainConfig
from library.errors import ConfigError

# optimizer_type in lower case, of optimizers that treat each number on its own
ELEMENTWISE = frozenset({
    "adamw", "adam", "adamax", "nadam", "radam", "rmsprop", "rprop", "sgd", "sgdnesterov", "adadelta", "asgd",
    "lion", "adamw_torch", "adamw_torch_fused",
})  # fmt: skip
# Prodigy needs two sums over all numbers; its step on pieces adds them up over ranks (library/distributed/prodigy.py).
PRODIGY = frozenset({"prodigy", "prodigyopt"})
REASONS = {
    "8bit": "quantises its state in blocks, which cross the borders of ZeRO's pieces",
    "schedulefree": "keeps two sets of weights and ZeRO's copies follow only one",
    "dadapt": "measures norms of all that is trained, of which a rank holds a piece",
    "adafactor": "keeps rows and columns of matrices, which ZeRO's flat pieces no longer are",
    "came": "keeps rows and columns of matrices, which ZeRO's flat pieces no longer are",
    "adagrad": "is made anew by DeepSpeed, without its learning rates",
}
SPLIT = (1, 2, 3)
BEGIN, END = "<!-- limits -->", "<!-- /limits -->"  # the table's place in docs/distributed.md
INSTEAD = "use zero_stage 0 or --distributed ddp, which take every optimizer"


class Limit(NamedTuple):
    """One row: what is asked for, at which stages it cannot be had, why, and what to do."""

    what: str
    stages: tuple[int, ...]
    asked: Callable[[TrainConfig], bool]
    why: str
    instead: str
    option: str = ""  # whose value to name instead of `what`


def _optimizer(config: TrainConfig) -> str:
    return (config.optimizer.optimizer_type or "AdamW").lower().removeprefix("torch.optim.")


def _argument(config: TrainConfig, *names: str) -> bool:
    """Whether network_args give one of `names` a value other than 0 or nothing."""
    pairs = (text.partition("=") for text in config.network.network_args)
    given = {key.strip(): value.strip().lower() for key, _, value in pairs}
    return any(given.get(name, "") not in ("", "0", "0.0", "none", "false") for name in names)


def _sliced(config: TrainConfig) -> bool:
    pairs = [text.replace(" ", "").partition("=") for text in config.optimizer.optimizer_args]
    return any(key == "slice_p" and value != "1" for key, _, value in pairs)


def _trains_text(config: TrainConfig) -> bool:
    rates = config.optimizer.text_encoder_lr
    return not config.network.network_train_unet_only and (not rates or any(rates))


def _kind(word: str) -> Callable[[TrainConfig], bool]:
    return lambda config: word in _optimizer(config)


LIMITS = (
    *(
        Limit(f"optimizer_type with {word!r} in its name", SPLIT, _kind(word), f"it {why}", INSTEAD, "optimizer_type")
        for word, why in REASONS.items()
    ),
    Limit(
        "another optimizer than " + ", ".join(sorted(ELEMENTWISE | PRODIGY)),
        SPLIT, lambda c: _optimizer(c) not in ELEMENTWISE | PRODIGY,
        "it is not known to treat each number on its own", INSTEAD, "optimizer_type",
    ),
    Limit(
        "Prodigy beside the training of a text encoder",
        SPLIT, lambda c: _optimizer(c) in PRODIGY and _trains_text(c),
        "ZeRO steps one group of parameters after the other, and Prodigy finds one step size for all of them",
        "add network_train_unet_only, or use zero_stage 0 or --distributed ddp",
    ),
    Limit(
        "Prodigy with slice_p above 1",
        SPLIT, lambda c: _optimizer(c) in PRODIGY and _sliced(c),
        "which numbers it would look at depends on the number of ranks",
        "leave slice_p out: ZeRO splits what it saves",
    ),
    Limit(
        "network_args module_dropout",
        SPLIT, lambda c: _argument(c, "module_dropout"),
        "ranks leave out different modules, and ZeRO reduces the same gradients on all ranks",
        "use rank_dropout or network_dropout, zero_stage 0 or --distributed ddp",
    ),
    Limit(
        "network_args ggpo_sigma and ggpo_beta",
        SPLIT, lambda c: _argument(c, "ggpo_sigma", "ggpo_beta"),
        "GGPO reads whole gradients, of which a rank holds a piece",
        "leave them out, or use zero_stage 0 or --distributed ddp",
    ),
    Limit(
        "full_bf16 and full_fp16",
        SPLIT, lambda c: c.training.full_bf16 or c.training.full_fp16,
        "ZeRO keeps a float32 copy of what is trained, so that nothing would be saved",
        "leave it out: trained weights are float32 then, and nothing else changes",
    ),
    Limit(
        "fp8_base",
        (3,), lambda c: c.memory.fp8_base,
        "DeepSpeed splits float32, bf16 and fp16 weights only",
        "leave it out (stage 3 divides bf16 weights by the number of GPUs), or use zero_stage 2",
    ),
    Limit(
        "base_compute",
        (3,), lambda c: c.memory.base_compute != "bf16",
        "DeepSpeed splits float32, bf16 and fp16 weights only",
        "leave it out, or use zero_stage 2",
    ),
    Limit(
        "join_adapter on",
        (3,), lambda c: c.memory.join_adapter == "on",
        "a layer cannot use weights that DeepSpeed brings for another module",
        "leave it out, or use zero_stage 2",
    ),
    Limit(
        "torch_compile and compile_blocks",
        (3,), lambda c: c.memory.compile_blocks != "off",
        "weights come and go within the compiled blocks",
        "leave it out, or use zero_stage 2",
    ),
    Limit(
        "blocks_to_swap",
        (0, *SPLIT), lambda c: bool(c.memory.blocks_to_swap),
        "DeepSpeed holds the whole module on the GPU or splits it itself",
        "use zero_stage 3, with offload_param_device cpu if that is not enough, or --distributed ddp",
    ),
    Limit(
        "offload_param_device",
        (0, 1, 2), lambda c: c.distributed.offload_param_device is not None,
        "weights are split, and so kept elsewhere, at stage 3 only",
        "set zero_stage to 3, or leave it out",
    ),
    Limit(
        "offload_param_device nvme without offload_param_nvme_path",
        (3,),
        lambda c: (
            c.distributed.offload_param_device == "nvme" and c.distributed.offload_param_nvme_path is None
        ),
        "DeepSpeed needs a folder to write to",
        "give offload_param_nvme_path",
    ),
    Limit(
        "offload_optimizer_device",
        (0,), lambda c: c.distributed.offload_optimizer_device is not None,
        "the optimizer is DeepSpeed's to place from stage 1 on",
        "set zero_stage to 1, 2 or 3, or leave it out",
    ),
)  # fmt: skip


def check_zero_limits(config: TrainConfig) -> None:
    """Raise ConfigError for the first row of the table that the options run into."""
    if not config.distributed.uses_deepspeed:
        return
    stage = config.distributed.zero_stage
    for limit in LIMITS:
        if stage in limit.stages and limit.asked(config):
            name = f"{limit.option} = {config.value(limit.option)}" if limit.option else limit.what
            raise ConfigError(
                f"DeepSpeed ZeRO stage {stage} cannot be used with {name}: {limit.why}; {limit.instead}"
            )


def limits_markdown() -> str:
    """The table for the docs."""
    rows = [
        f"| {limit.what} | {', '.join(map(str, limit.stages))} | {limit.why} | {limit.instead} |"
        for limit in LIMITS
    ]
    return "\n".join(["| option | not at stages | because | instead |", "|---|---|---|---|", *rows])


def with_limits(page: str) -> str:
    """`page`, Markdown with a place marked for it, with the table in that place."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{limits_markdown()}\n{END}{after}"
