"""ep2tp's own fused-MoE kernel on the weights that an engine loaded, where it wins: the same for every engine.

The choice is by the number of tokens of a call, a Python number that is fixed when a CUDA graph is captured. On GPUs
engines call their experts inside a custom operation of their own, into which ``torch.compile`` does not look.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from ep2tp.engines.loaded_experts import Experts, UnfitError
from ep2tp.engines.seams import Seam
from ep2tp.errors import LaunchError, SeamError, SettingError
from ep2tp.settings import Kernel

if TYPE_CHECKING:
    from ep2tp.kernels.configs import KernelConfig

_MISSING = (AttributeError, TypeError, LookupError, ValueError, ImportError)  # what a renamed private part raises
_MOST_TOKENS = 8192  # what a launch's report looks at


class Device(NamedTuple):
    """A GPU's name, by which tables of configurations are looked up, and its compute capability."""

    name: str
    capability: tuple[int, int]


class LayerKernel:
    """ep2tp's kernel on one layer's experts, for the numbers of tokens at which it is to run."""

    def __init__(self, experts: Experts, engine: str, device: Device, is_forced: bool) -> None:
        """The kernel on one layer.

        Args:
            experts: the layer's.
            engine: ``vllm`` or ``sglang``, whose kernel it is measured against.
            device: the GPU.
            is_forced: it runs at every number of tokens (``EP2TP_KERNEL=ep2tp``), not only where it wins.
        """
        self.experts, self._engine, self.device, self._is_forced = experts, engine, device, is_forced
        self._configs: dict[int, KernelConfig | None] = {}

    def config(self, tokens: int) -> KernelConfig | None:
        """The configuration for a number of tokens; None where the engine's kernel is to run."""
        if tokens not in self._configs:
            self._configs[tokens] = self._find(tokens)
        return self._configs[tokens]

    def __call__(self, x: Any, topk_weights: Any, topk_ids: Any, config: KernelConfig) -> Any:
        """The experts' weighted sum, [M, K], of ``x`` [M, K] routed by ``topk_weights`` and ``topk_ids`` [M, top_k]."""
        from ep2tp.kernels.fused_moe import fused_moe

        return fused_moe(
            x,
            self.experts.gate_up,
            self.experts.down,
            topk_weights,
            topk_ids,
            activation=self.experts.activation,
            apply_router_weight_on_input=self.experts.weighs_input,
            config=config,
        )

    def __str__(self) -> str:
        """Whose kernel runs when, for a log."""
        owner = owners(lambda tokens: self.config(tokens) is not None)
        if owner == "the engine's":
            return f"the engine's: no table of {self.device.name} says that ep2tp's is faster on {self.experts}"
        return f"{owner} on {self.experts}, {self.device.name}"

    def _find(self, tokens: int) -> KernelConfig | None:
        from ep2tp.kernels import configs, tuned_configs

        key, form = self.experts.key, self.experts.gate_up.format
        found = tuned_configs.choose(self._engine, self.device.name, key, form, tokens, self._is_forced)
        return configs.default(tokens, self.device.capability) if found is None and self._is_forced else found


def owners(is_ours: Callable[[int], bool]) -> str:
    """Whose kernel runs at which numbers of tokens M.

    Example:
        >>> owners(lambda tokens: tokens <= 64)
        "ep2tp's for M<=64, the engine's above"
    """
    tokens = [1 << power for power in range(_MOST_TOKENS.bit_length())]
    ours = [count for count in tokens if is_ours(count)]
    if not ours:
        return "the engine's"
    if ours == tokens:
        return "ep2tp's"
    if ours == tokens[: len(ours)]:
        return f"ep2tp's for M<={ours[-1]}, the engine's above"
    return f"ep2tp's for M={','.join(map(str, ours))}, the engine's between and above"


def this_device() -> Device:
    """This process's GPU."""
    import torch

    if not torch.cuda.is_available():
        return Device("cpu", (0, 0))
    return Device(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def seam_holds(seam: Seam, kernel: Kernel, logger: logging.Logger) -> bool:
    """Whether this engine runs experts as ep2tp expects; logs why not.

    Raises:
        SeamError: ``EP2TP_KERNEL=ep2tp``, and this engine does not run experts as ep2tp expects.
    """
    if problem := seam.problem():
        if kernel is Kernel.EP2TP:
            raise SeamError(f"EP2TP_KERNEL=ep2tp: {problem}; EP2TP_KERNEL=auto uses the engine's kernel")
        logger.warning("ep2tp kernel: the engine's: %s", problem)
        return False
    return True


def put_on_layers(
    layers: Iterable[tuple[str, Any]], put: Callable[[Any], str], kernel: Kernel, logger: logging.Logger
) -> list[str]:
    """Put ep2tp's kernel on each layer that it takes.

    Args:
        layers: names and layers.
        put: puts it on one layer and says whose kernel runs when; raises :class:`UnfitError` where it does not fit, and
            :class:`SettingError` where the user's table cannot be read.
        kernel: ``EP2TP_KERNEL``.
        logger: for a warning where this version of the engine keeps a layer's parts elsewhere.

    Returns:
        A line for each outcome, and how many layers have it.

    Raises:
        LaunchError: ``EP2TP_KERNEL=ep2tp``, and a layer that the kernel does not take.
    """
    outcomes: Counter[str] = Counter()
    for name, layer in layers:
        try:
            outcomes[put(layer)] += 1
        except (UnfitError, SettingError, *_MISSING) as error:
            is_expected = isinstance(error, UnfitError | SettingError)
            name_of = type(error).__name__
            why = error if is_expected else f"this engine's layers are not as ep2tp expects ({name_of}: {error})"
            if kernel is Kernel.EP2TP:
                text = f"EP2TP_KERNEL=ep2tp: {name}: {why}; EP2TP_KERNEL=auto uses the engine's"
                raise LaunchError(text) from (None if is_expected else error)
            outcome = f"the engine's: {why}"
            if not is_expected and not outcomes[outcome]:
                logger.warning("ep2tp kernel: the engine's: %s: %s; please report this", name, why)
            outcomes[outcome] += 1
    lines = [f"ep2tp kernel: {count} MoE layers: {outcome}" for outcome, count in outcomes.items()]
    return lines or ["ep2tp kernel: the engine's: this part of the model has no MoE layer that ep2tp knows"]
