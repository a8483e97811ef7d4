"""Lets an unchanged SGLang 0.5.23 run on a CPU. Imported by every Python of the environment, through the .pth file.

- torchvision comes as a CUDA build, whose import registers meta kernels of two operators that its C++ part, not loaded
  here, defines: they are declared before it is imported.
- ``torch_native`` attention has no handler for multi-head latent attention of DeepSeek; its plain MLA path is one.
- For tests of padding: SGLang pads sizes itself on CPUs, so that no loader sees a size that does not divide, as one
  does on a GPU. ``SGLANG_CPU_SHIM_PAD=ep2tp`` leaves that to ep2tp.
"""

import importlib.abc
import os
import sys

_SIZES = ("moe_intermediate_size", "intermediate_size")


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(self)


_kept: list[_DeclareOperators] = []
sys.meta_path.insert(0, _DeclareOperators())


def register() -> None:
    """SGLang's plugin entry point."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry, AttnForwardMethod

    AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)
    if os.environ.get("SGLANG_CPU_SHIM_PAD") == "ep2tp":
        _leave_padding_to_ep2tp()


def _leave_padding_to_ep2tp() -> None:
    from sglang.srt.model_executor import model_runner

    from ep2tp.engines.sglang import experts

    adjust = model_runner.adjust_config_with_unaligned_cpu_tp

    def without_sizes(model_config, load_config, tp_size):
        configs = (model_config.hf_config, model_config.hf_text_config)
        before = [(c, name, getattr(c, name)) for c in configs for name in _SIZES if hasattr(c, name)]
        adjusted = adjust(model_config, load_config, tp_size)
        for config, name, value in before:
            setattr(config, name, value)
        return adjusted

    model_runner.adjust_config_with_unaligned_cpu_tp = without_sizes
    experts.pads_itself = lambda device: False
