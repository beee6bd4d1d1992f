"""[memory] What is recomputed, compressed or compiled."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.kinds import BlockCount
from library.config.options import Limit, no_effect, option

ALWAYS_SDPA = "`attention` chooses the kernel, by itself the fastest one that is right on the GPU at hand"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """Memory and speed."""

    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    recompute: str = option(
        "all",
        "what gradient_checkpointing recomputes; cheap keeps attention and narrow products where blocks are compiled",
        choices=("all", "cheap"),
        ours=True,
    )
    recompute_blocks: BlockCount | None = option(
        None,
        "how many blocks gradient_checkpointing recomputes, the first ones; all, or auto: as few as memory allows",
        limit=Limit(ge=0, le=57, unit="blocks"),
        unset=("all",),
        ours=True,
    )
    fp8_base: bool = option(False, "store frozen weights as float8 and compute in the training precision")
    fp8_base_unet: bool = option(False, "the same for the transformer only; implies fp8_base")
    base_compute: str = option(
        "bf16",
        "how frozen weights of the blocks are multiplied: bf16 means the training precision, fp8 and int8 take "
        "8 bits with scales, auto fp8 where the GPU has it, else int8",
        choices=("bf16", "fp8", "int8", "auto"),
        ours=True,
    )
    torch_compile: bool = option(False, "compile the transformer; the same as compile_blocks on")
    compile_blocks: str = option(
        "off",
        "compile the blocks of the transformer; auto does where it pays",
        choices=("off", "on", "auto"),
        ours=True,
    )
    dynamo_backend: str = option(
        "inductor",
        "backend of torch_compile; given alone it turns that on",
        choices=(
            "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs",
            "ofi", "fx2trt", "onnxrt", "tensort", "ipex", "tvm",
        ),
        unset=("no",),
    )  # fmt: skip
    cuda_graphs: str = option(
        "auto",
        "record a step of each size as a CUDA graph and replay it; auto does where blocks are compiled",
        choices=("off", "on", "auto"),
        ours=True,
    )
    blocks_to_swap: int | None = option(
        None,
        "transformer blocks that wait in main memory until their turn; at most 35 for a whole FLUX.1",
        limit=Limit(ge=0, unit="blocks"),
    )
    cpu_offload_checkpointing: bool = option(
        False, "inputs of recomputed blocks wait in main memory; implies gradient_checkpointing"
    )
    split_mode: bool = option(False, "old form of blocks_to_swap; means 18 unless that is given")
    lowram: bool = option(
        False,
        "save main memory",
        effect=no_effect("the transformer and the text encoders are read straight to where they compute"),
    )
    highvram: bool = option(
        False,
        "keep the GPU's cache between batches",
        effect=no_effect("it is never emptied between batches"),
    )
    attention: str = option(
        "auto",
        "kernel of the attention; auto tries them on the GPU once and takes the fastest that is right; flash3 and "
        "flash4 are packages that you install",
        choices=("auto", "cudnn", "flash", "flash3", "flash4", "efficient", "math"),
        ours=True,
    )
    join_adapter: str = option(
        "auto",
        "add a LoRA's product within the product of its layer; auto does on NVIDIA GPUs",
        choices=("off", "on", "auto"),
        ours=True,
    )
    sdpa: bool = option(False, "use torch's attention", effect=no_effect(ALWAYS_SDPA, quiet=True))
    xformers: bool = option(False, "use xformers' attention", effect=no_effect(ALWAYS_SDPA))
    mem_eff_attn: bool = option(False, "use memory-efficient attention", effect=no_effect(ALWAYS_SDPA))
