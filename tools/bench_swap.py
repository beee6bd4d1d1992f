"""What blocks_to_swap and cpu_offload_checkpointing cost in time and save in memory, on this machine.

    python -m tools.bench_swap --json swap.json

A FLUX.1-dev of random weights, made on the GPU, with a LoRA on every Linear of its blocks, is trained for a few
steps at each setting, with gradient_checkpointing. Loss and LoRA gradients of one step are compared with
those of the model that keeps everything on the GPU; that step runs twice there, so that the kernels' own
scatter is known. Results are printed and written after each setting; the exit code is 1 if any differs or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from library.config.sections.network import NetworkConfig
from library.errors import UserError
from library.files.atomic import write_text
from library.flow.path import image_ids
from library.models.flux import Flux
from library.models.params import FluxParams, rotary_axes
from library.models.precision import store_blocks_in_fp8
from networks.interface import create

BLOCKS = (0, 8, 18, 28, 34)
CONTEXT_TOKENS = 512
SMALL = FluxParams(
    vec_in_dim=24, context_in_dim=40, hidden_size=32, num_heads=2, mlp_hidden=128, axes_dim=rotary_axes(16)
)
TOLERANCE = 1e-6  # relative, beyond twice the scatter of the kernels


@dataclass(frozen=True, slots=True)
class Result:
    """One setting. Times in seconds, memory in 1e9 bytes, differences relative."""

    blocks_to_swap: int
    cpu_offload_checkpointing: bool
    seconds_per_step: float | None = None
    all_seconds: tuple[float, ...] = ()
    peak_gb: float | None = None
    reserved_gb: float | None = None
    main_memory_gb: float = 0.0  # of waiting blocks
    setup_seconds: float = 0.0
    loss_difference: float | None = None
    gradient_difference: float | None = None
    equal: bool = False
    error: str | None = None


class Subject:
    """The model under test, its LoRA, and one batch."""

    def __init__(
        self, params: FluxParams, device: torch.device, *, pixels: int, batch: int, fp8: bool
    ) -> None:
        self.device = device
        torch.manual_seed(0)
        self.model = random_transformer(params, device)
        if fp8:
            store_blocks_in_fp8(self.model)
        config = NetworkConfig(
            network_module="networks.lora_flux",
            network_dim=16,
            network_alpha=16,
            network_train_unet_only=True,
        )
        network = create(config, text_encoders=[], transformer=self.model)
        network.apply()
        network.module.to(device, torch.float32)
        groups = network.parameter_groups(learning_rate=1e-4, unet_lr=None, text_encoder_lr=None)
        self.trained = [parameter for group in groups for parameter in group.params]
        with torch.no_grad():
            for parameter in self.trained:  # no up weight is zero, so every gradient says something
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        # A rate of 0: a step costs what it costs, and every setting starts from the same weights.
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, fused=device.type == "cuda")
        self.root = nn.ModuleList((self.model, network.module)).train()
        side = pixels // 8  # latent cells
        tokens = (side // 2) ** 2

        def random(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device)

        self.inputs = {
            "img": random(tokens, params.in_channels),
            "img_ids": image_ids(batch, height=side, width=side, device=device),
            "txt": random(CONTEXT_TOKENS if pixels >= 512 else 8, params.context_in_dim),
            "timesteps": torch.rand(batch, device=device),
            "y": random(params.vec_in_dim),
            "guidance": torch.ones(batch, device=device),
        }
        self.inputs["txt_ids"] = torch.zeros(*self.inputs["txt"].shape[:2], 3, device=device)
        self.target = random(tokens, params.out_channels)

    def forward_backward(self) -> Tensor:
        """The loss, detached, []; gradients are left in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            prediction = self.model(**self.inputs)
        loss = (prediction.float() - self.target).square().mean()
        torch.autograd.backward(loss)
        return loss.detach()

    def gradients(self) -> tuple[float, Tensor]:
        """Loss, and every gradient in one vector in main memory, from deterministic kernels."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        loss = self.forward_backward()
        grads = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        torch.use_deterministic_algorithms(False)
        assert len(grads) == len(self.trained), "every trained weight has a gradient"
        return float(loss), torch.cat([grad.flatten().cpu() for grad in grads])

    def step(self) -> float:
        """Seconds of one optimizer step, waiting for the device at both ends."""
        self.wait()
        start = time.perf_counter()
        self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def swapping(self, blocks_to_swap: int) -> Iterator[float]:
        """With that many blocks off the device; yields the 1e9 bytes of main memory they take."""
        if not blocks_to_swap:
            yield 0.0
            return
        try:
            yield self.model.enable_block_swap(blocks_to_swap).host_bytes / 1e9
        finally:
            self.model.disable_block_swap()


def random_transformer(params: FluxParams, device: torch.device) -> Flux:
    """A frozen bf16 transformer whose activations stay near 1, made on `device`."""
    with torch.device("meta"):
        model = Flux(params).to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            parameter.fill_(1.0)
        elif parameter.ndim > 1:
            parameter.normal_(std=0.5 * parameter.shape[1] ** -0.5)
        else:
            parameter.zero_()
    return model


def difference(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm of `other`."""
    return float((one - other).norm() / other.norm())


@dataclass(frozen=True, slots=True)
class Reference:
    """Loss and gradients of the model that keeps everything on the device, and how far two runs are apart."""

    loss: float
    gradient: Tensor
    loss_scatter: float
    gradient_scatter: float

    @classmethod
    def of(cls, subject: Subject) -> Reference:
        subject.model.enable_gradient_checkpointing()
        loss, gradient = subject.gradients()
        again, second = subject.gradients()
        return cls(loss, gradient, abs(again - loss) / abs(loss), difference(second, gradient))


def measure(
    subject: Subject, reference: Reference, *, blocks_to_swap: int, offload: bool, steps: int
) -> Result:
    """Check, then time one setting; the caller has the blocks swapped already."""
    subject.model.enable_gradient_checkpointing(offload_inputs=offload)
    loss, gradient = subject.gradients()
    loss_difference = abs(loss - reference.loss) / abs(reference.loss)
    gradient_difference = difference(gradient, reference.gradient)
    equal = (
        loss_difference <= TOLERANCE + 2 * reference.loss_scatter
        and gradient_difference <= TOLERANCE + 2 * reference.gradient_scatter
    )
    on_gpu = subject.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(subject.device)
    subject.step()
    seconds = tuple(subject.step() for _ in range(steps))
    return Result(
        blocks_to_swap,
        offload,
        seconds_per_step=statistics.median(seconds),
        all_seconds=seconds,
        peak_gb=torch.cuda.max_memory_allocated(subject.device) / 1e9 if on_gpu else None,
        reserved_gb=torch.cuda.max_memory_reserved(subject.device) / 1e9 if on_gpu else None,
        loss_difference=loss_difference,
        gradient_difference=gradient_difference,
        equal=equal,
    )


def copy_speed(device: torch.device) -> float | None:
    """Bytes from pinned main memory to the GPU, in 1e9 a second; None without one."""
    if device.type != "cuda":
        return None
    host = torch.empty(1 << 29, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    there.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(4):
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    return 4 * host.nbytes / 1e9 / (time.perf_counter() - start)


def run(arguments: argparse.Namespace) -> list[Result]:
    """Every setting in turn; results are shown and written as they come."""
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.small else "cpu")
    if device.type == "cpu" and not arguments.small:
        raise SystemExit("error: there is no GPU here; --small runs a tiny model on the CPU")
    params, pixels = (SMALL, 64) if arguments.small else (FluxParams(), arguments.resolution)
    about: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "blocks": [params.depth, params.depth_single_blocks],
        "resolution": pixels,
        "batch": arguments.batch,
        "fp8_base": arguments.fp8,
        "copy_gb_per_second": copy_speed(device),
    }
    subject = Subject(params, device, pixels=pixels, batch=arguments.batch, fp8=arguments.fp8)
    reference = Reference.of(subject)
    about |= {"loss": reference.loss, "loss_scatter": reference.loss_scatter}
    about |= {"gradient_scatter": reference.gradient_scatter, "made_in_seconds": time.perf_counter() - start}
    print(json.dumps(about), flush=True)
    results: list[Result] = []
    for blocks_to_swap in arguments.blocks:
        for result in settings(subject, reference, blocks_to_swap, arguments, start):
            results.append(result)
            print(line(result), flush=True)
            if arguments.json is not None:
                whole = {**about, "results": [asdict(one) for one in results]}
                write_text(arguments.json, json.dumps(whole, indent=1))
    return results


def settings(
    subject: Subject, reference: Reference, blocks_to_swap: int, arguments: argparse.Namespace, start: float
) -> Iterator[Result]:
    """The settings with `blocks_to_swap`; what fails or finds no time left is a result too."""
    offloads = [False, True]
    before = time.perf_counter()
    try:
        if before - start > arguments.seconds:
            raise TimeoutError(f"not run: {arguments.seconds} seconds are over")
        with subject.swapping(blocks_to_swap) as main_memory_gb:
            setup = time.perf_counter() - before
            while offloads:
                measured = measure(
                    subject,
                    reference,
                    blocks_to_swap=blocks_to_swap,
                    offload=offloads[0],
                    steps=arguments.steps,
                )
                offloads.pop(0)
                yield Result(**{**asdict(measured), "main_memory_gb": main_memory_gb, "setup_seconds": setup})
    except (
        RuntimeError,
        AssertionError,
        TimeoutError,
        UserError,
    ) as error:  # out of memory is a RuntimeError
        for offload in offloads:
            yield Result(blocks_to_swap, offload, error=f"{type(error).__name__}: {error}"[:500])


def line(result: Result) -> str:
    """One setting in one line."""
    name = f"blocks_to_swap {result.blocks_to_swap:>2}" + (
        " + cpu_offload_checkpointing" if result.cpu_offload_checkpointing else ""
    )
    if result.error is not None or result.seconds_per_step is None:
        return f"{name:<46} {result.error}"
    memory = "" if result.peak_gb is None else f"  {result.peak_gb:6.2f} GB"
    return (
        f"{name:<46} {result.seconds_per_step:7.3f} s/step{memory}  {result.main_memory_gb:5.1f} GB in main memory"
        f"  gradients {'equal' if result.equal else 'DIFFER'} ({result.gradient_difference:.1e})"
    )


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 0 when every setting ran and gave the same gradients."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file to write the results to, after each setting")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=list(BLOCKS), help="values of blocks_to_swap"
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each setting")
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    parser.add_argument("--resolution", type=int, default=1024, help="side of the images in pixels")
    parser.add_argument("--fp8", action="store_true", help="store block weights in 8 bits, as fp8_base does")
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="start no further setting after that long"
    )
    arguments = parser.parse_args(words)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    results = run(arguments)
    return 0 if all(result.equal for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
