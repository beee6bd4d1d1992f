"""Which kernel computes attention: the fastest one that computes right, on this GPU, in this dtype.

torch has several kernels behind `scaled_dot_product_attention`, and some of them have been wrong, or have
brought the process down, on some cards in some versions. So each is tried before it is trusted: output and
gradients of an attention of FLUX's length against the plain formula in float32, with and without a key mask,
and inside a compiled function where the run compiles. The trial is a process of its own (a kernel that reads
where it must not takes its process along) that works while weights are read. Its verdict is kept in the
user's cache folder for this GPU, torch and cuDNN, so only the first run may wait for it. Where the user has installed
FlashAttention 3 or 4 they are tried as well, last, and a verdict counts for their version. A trial that fails for a
reason that is not the kernel's (no memory left beside the model, a signal) judges nothing, and nothing of it is kept.

The choice holds for the whole process. Kernels that failed are switched off in it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.errors import EnvironmentUnsupported
from library.files.atomic import write_text
from library.files.user_cache import cache_folder
from library.models import flash_packages

logger = logging.getLogger(__name__)

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    # One of them at a time, in place of "flash".
    **dict.fromkeys(flash_packages.PACKAGES, SDPBackend.FLASH_ATTENTION),
}
TRIED = ("cudnn", "flash", "efficient")  # math is what they are held against, and too large to be used
MASKED = frozenset({"cudnn", "efficient"})  # kernels that take a mask; for others torch takes the next one
LENGTH, HEAD, HEADS = 4608, 128, 24  # of FLUX at 1024 x 1024; few heads are compared, all are timed
TRIAL_SECONDS = 300
_ROUNDS, _CALLS = 4, 5
_TRIAL = 2  # counts what a trial has become: verdicts of earlier ones are not read
NO_MEMORY = 3  # exit code of a trial process
_SIGNALLED = {
    -getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL") if hasattr(signal, name)
}
# Of the largest number; two roundings of a 16-bit dtype, where the wrong kernels seen were wrong by all of it.
_TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-3}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial found: seconds of forward and backward, None for a kernel that is not to be used, and why."""

    seconds: Mapping[str, float | None]
    faults: Mapping[str, str]

    @property
    def fastest(self) -> str:
        """The kernel to use."""
        right = {name: taken for name, taken in self.seconds.items() if taken is not None}
        return min(right, key=lambda name: right[name]) if right else "math"


class TrialDisturbed(Exception):
    """What ended a trial says nothing about a kernel."""


def refuse(wanted: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """Raise EnvironmentUnsupported when the kernel asked for is of a package that cannot be used here."""
    if wanted in flash_packages.PACKAGES and (reason := flash_packages.refusal(wanted, device, dtype)):
        raise EnvironmentUnsupported(f"attention = {wanted} {reason}: without it, use attention = auto")


def begin(wanted: str, *, device: torch.device, dtype: torch.dtype, compiled: bool) -> Future[Verdict] | None:
    """Find the verdict for this machine in the background, for `settle`; None where there is nothing to choose.

    Raises EnvironmentUnsupported as `refuse` does.
    """
    refuse(wanted, device=device, dtype=dtype)
    # In float32 torch has one kernel beside the formula, and no trial to wait for would change what it takes.
    if device.type != "cuda" or (wanted == "auto" and dtype == torch.float32):
        return None
    pool = ThreadPoolExecutor(1, thread_name_prefix="attention")
    coming = pool.submit(kept_verdict, device, dtype, compiled=compiled)
    pool.shutdown(wait=False)
    return coming


def settle(wanted: str, coming: Future[Verdict] | None, *, device: torch.device) -> str:
    """Choose among the kernels (`wanted` is one of them or "auto"), put the choice in effect, return it.

    `coming` is what `begin` gave. "auto" comes back where a trial was disturbed and torch chooses.

    Raises EnvironmentUnsupported when the kernel asked for fails on this card.
    """
    if coming is None:
        return "math" if wanted == "auto" else wanted  # torch's own choice: there is nothing to choose from
    try:
        verdict = coming.result()
    except TrialDisturbed as error:
        logger.warning(
            "attention: the kernels could not be tried (%s), so torch chooses; the next run tries", error
        )
        if wanted == "auto":
            return wanted
        verdict = Verdict(dict.fromkeys(TRIED, 0.0), {})
    if verdict.seconds.get(wanted, 0.0) is None:
        raise EnvironmentUnsupported(
            f"attention = {wanted} does not work on {torch.cuda.get_device_name(device)} with torch "
            f"{torch.__version__} ({verdict.faults.get(wanted, 'it failed its trial')}): use attention = auto"
        )
    chosen = verdict.fastest if wanted == "auto" else wanted
    _let_torch_begin(device)
    use(chosen, verdict)
    logger.info("attention: %s%s", chosen, _reasons(verdict))
    return chosen


def _reasons(verdict: Verdict) -> str:
    """What the trial found, for the line of the log: the fastest first, and what is not to be used."""
    right = sorted((taken, name) for name, taken in verdict.seconds.items() if taken)
    times = ", ".join(f"{name} {taken * 1000:.1f} ms" for taken, name in right)
    faults = "".join(f"; {name}: {fault}" for name, fault in verdict.faults.items())
    return (f" ({times})" if times else "") + faults


def _let_torch_begin(device: torch.device) -> None:
    """Have torch choose a kernel once: when it first does, it puts its own order in place of any that is set."""
    x = torch.empty(1, 1, 8, 64, device=device, dtype=torch.bfloat16)
    torch._fused_sdp_choice(x, x, x)


def use(chosen: str, verdict: Verdict) -> None:
    """Let torch take `chosen`, then the others that are right, from the fastest on; the rest is off."""
    if chosen in flash_packages.PACKAGES:
        flash_packages.activate(chosen)
    taken = {name: s for name, s in verdict.seconds.items() if s is not None}
    for package in flash_packages.PACKAGES:
        taken.pop(package, None)  # what is not chosen is not there
    order = dict.fromkeys(
        BACKENDS[name] for name in (chosen, *sorted(taken, key=lambda name: taken[name]), "math")
    )
    switches: dict[SDPBackend, Callable[[bool], None]] = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.enable_cudnn_sdp,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.enable_flash_sdp,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.enable_mem_efficient_sdp,
        SDPBackend.MATH: torch.backends.cuda.enable_math_sdp,
    }
    for backend, switch in switches.items():
        switch(backend in order)
    first = [backend.value for backend in order]
    others = [number for number in torch._C._get_sdp_priority_order() if number not in first]
    torch._C._set_sdp_priority_order([*first, *others])


def in_effect() -> str:
    """What decides in this process which kernel torch takes, as one word."""
    own = torch._C
    on = (
        own._get_cudnn_sdp_enabled(), own._get_flash_sdp_enabled(),
        own._get_mem_efficient_sdp_enabled(), own._get_math_sdp_enabled(),
    )  # fmt: skip
    return "-".join(str(int(number)) for number in (*on, *own._get_sdp_priority_order()))


def kept_verdict(device: torch.device, dtype: torch.dtype, *, compiled: bool) -> Verdict:
    """The verdict for this machine: from the user's cache folder, else from a trial whose result goes there."""
    key = {
        "gpu": torch.cuda.get_device_name(device), "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "dtype": str(dtype), "compiled": compiled, "trial": _TRIAL,
    }  # fmt: skip
    packages = flash_packages.usable(device, dtype)
    key |= {name: flash_packages.installed(name) for name in packages}
    name = "-".join(str(part) for part in key.values()).replace(" ", "_").replace("/", "_")
    file = cache_folder() / "attention" / f"{name}.json"
    kept = _read(file)
    if kept is not None:
        return kept
    logger.info("attention: trying the kernels of this GPU; the result is kept for later runs")
    found = trial(device, dtype, compiled=compiled, kernels=(*TRIED, *packages))
    try:
        write_text(file, json.dumps(asdict(found), indent=1))
    except OSError as error:
        logger.warning("attention: the result could not be kept (%s), so the next run tries again", error)
    return found


def _read(file: Path) -> Verdict | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Verdict(dict(values["seconds"]), dict(values["faults"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def trial(
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
    kernels: Sequence[str] = TRIED,
    command: Sequence[str] = (sys.executable, "-m", "library.models.attention"),
) -> Verdict:
    """Try kernels in a process that may crash or hang; what comes after one that did gets a fresh process.

    Raises TrialDisturbed where the process had no memory, or was told or made to end.
    """
    seconds: dict[str, float | None] = {}
    faults: dict[str, str] = {}
    setting = (str(device), str(dtype).removeprefix("torch."), "compiled" if compiled else "eager")
    while left := [name for name in kernels if name not in seconds]:
        said, fault = _run([*command, *setting, *left])
        for line in said.splitlines():
            name, _, answer = line.partition(" ")
            if name in left:
                seconds[name] = float(answer)
        failed = next((name for name in left if name not in seconds), None)
        if failed is not None:
            seconds[failed], faults[failed] = None, fault
    return Verdict(seconds, faults)


def _run(command: Sequence[str]) -> tuple[str, str]:
    """What a command printed, and what ended it. Raises TrialDisturbed."""
    root = Path(__file__).resolve().parents[2]
    # Its few small kernels are compiled before a pool of processes for that has started.
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ}
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False, cwd=root,
            env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        return said.decode() if isinstance(said, bytes) else said, f"no answer in {TRIAL_SECONDS} s"
    code, lines = ended.returncode, ended.stderr.strip().splitlines()
    last = lines[-1][:200] if lines else ""
    if code == NO_MEMORY or code in _SIGNALLED:
        raise TrialDisturbed(last if code == NO_MEMORY else f"signal {-code} ended the trial")
    # Of a crash the last line of stderr tells nothing.
    return ended.stdout, last if code == 1 and last else f"it ended its process with code {code}"


def check(
    name: str, device: torch.device, dtype: torch.dtype, *, compiled: bool, length: int | None = None
) -> None:
    """Hold one kernel against the plain formula. Raises RuntimeError where it is wrong or cannot be used.

    Where nothing can be compiled (no triton, no C compiler) it is held uncompiled, as blocks run then.
    """
    length, function = length or LENGTH, _attend
    if compiled:
        function = torch.compile(_attend, dynamic=False)
    masks: list[Tensor | None] = [None]
    if name in MASKED or device.type != "cuda":
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=device)
        mask[..., length // 16 : length // 8] = False
        masks.append(mask)
    for masked in masks:
        inputs = _inputs(device, dtype, heads=2, length=length)
        with sdpa_kernel(BACKENDS[name]):
            if compiled:
                # Else what was compiled for the last kernel would be taken, from here or from what torch keeps.
                torch.compiler.reset()
                torch.compiler.config.cache_key_tag = in_effect()
            try:
                results = _differentiate(function, inputs, masked)
            except RuntimeError as error:
                if function is _attend or not _compiler_failed(error):
                    raise
                function = _attend
                results = _differentiate(function, inputs, masked)
        wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
        expected = _differentiate(_formula, wide, masked)
        for what, got, wanted in zip(("output", "dq", "dk", "dv"), results, expected, strict=True):
            distance = float(((got.float() - wanted).abs().max() / wanted.abs().max()).detach())
            if not distance < _TOLERANCE[dtype]:
                raise RuntimeError(f"{what} is off by {distance:.2g} of the largest value")


def _compiler_failed(error: Exception) -> bool:
    dynamo = importlib.import_module("torch._dynamo")  # there by now: something was compiled
    return isinstance(error, dynamo.exc.TorchDynamoException)


def time_kernel(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one forward and backward of all heads: the least of a few rounds.

    Within a round the processor launches ahead, as it does in a step: a kernel whose launch takes long is not
    blamed for it unless the GPU has to wait.
    """
    inputs = _inputs(device, dtype, heads=HEADS, length=LENGTH)
    taken = []
    with sdpa_kernel(BACKENDS[name]):
        for _ in range(_ROUNDS):  # some of them may coincide with what the run does to its weights
            _wait(device)
            start = time.perf_counter()
            for _ in range(_CALLS):
                _differentiate(_attend, inputs, None)
            _wait(device)
            taken.append((time.perf_counter() - start) / _CALLS)
    return min(taken)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # Arithmetic around the kernel, as in a block: a compiler fuses it into the kernel's neighbours.
    out = F.scaled_dot_product_attention(q * 1.0, k * 1.0, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2) * 1.0


def _formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    out: Tensor = logits.softmax(dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


def _differentiate(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], mask: Tensor | None
) -> list[Tensor]:
    """Output and gradients for a fixed direction."""
    out = function(*inputs, mask)
    direction = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, direction)]


def _inputs(device: torch.device, dtype: torch.dtype, *, heads: int, length: int) -> list[Tensor]:
    """Queries, keys and values as a block makes them: heads of one projection [1, L, 3 H D], not contiguous."""
    generator = torch.Generator(device=device).manual_seed(0)
    made = torch.randn(1, length, 3, heads, HEAD, generator=generator, device=device).to(dtype)
    return [one.transpose(1, 2).detach().requires_grad_() for one in made.unbind(2)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str]) -> int:
    """Try kernels one after another: name and seconds of each on stdout, until one is wrong (stderr, code 1).

    Code 3: there was no memory for it.
    """
    device, dtype = torch.device(argv[0]), getattr(torch, argv[1])
    for name in argv[3:]:
        try:
            if name in flash_packages.PACKAGES:
                flash_packages.activate(name)
            check(name, device, dtype, compiled=argv[2] == "compiled")
            taken = time_kernel(name, device, dtype)
        except (RuntimeError, ValueError, EnvironmentUnsupported) as error:
            # Whatever comes after an error of the GPU fails as well: the rest is for another process.
            sys.stderr.write(" ".join(str(error).split())[:200] + "\n")
            return (
                NO_MEMORY if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) else 1
            )
        sys.stdout.write(f"{name} {taken}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
