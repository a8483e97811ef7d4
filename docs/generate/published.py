"""The checkpoints of the serving guides: pages, models, and the format and hub ids of each checkpoint.

Models are those of ``tests/data``, where the source of each config is named. Hub ids are of the publishers' own
checkpoints, those of NVFP4 of NVIDIA's, as github.com/vllm-project/recipes and github.com/ai-dynamo/aiconfigurator name
them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a model.

    Attributes:
        form: its format, as ``ep2tp.model.formats`` names it.
        hub: its hub id; ``MODEL`` where checkpoints in this format differ in what else they quantise.
        others: hub ids of further checkpoints, of this shape and format.
    """

    form: str
    hub: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Served:
    """One model of a page: its heading, its name in ``tests/data``, and its checkpoints."""

    title: str
    name: str
    checkpoints: tuple[Checkpoint, ...]


def _served(title: str, name: str, **hubs: str | tuple[str, ...]) -> Served:
    """A model with the hub id, or ids, of each format."""
    ids = {form: (hub,) if isinstance(hub, str) else hub for form, hub in hubs.items()}
    return Served(title, name, tuple(Checkpoint(form, first, tuple(others)) for form, (first, *others) in ids.items()))


PAGES: dict[str, tuple[str, tuple[Served, ...]]] = {
    "deepseek": (
        "DeepSeek",
        (
            _served("DeepSeek-V2-Lite", "DeepSeek-V2-Lite", bf16="deepseek-ai/DeepSeek-V2-Lite-Chat"),
            _served(
                "DeepSeek-V3, R1, V3.1",
                "DeepSeek-V3/R1/V3.1",
                fp8_block128=(
                    "deepseek-ai/DeepSeek-V3",
                    "deepseek-ai/DeepSeek-R1",
                    "deepseek-ai/DeepSeek-R1-0528",
                    "deepseek-ai/DeepSeek-V3.1",
                ),
                nvfp4=(
                    "MODEL",
                    "nvidia/DeepSeek-V3-0324-NVFP4",
                    "nvidia/DeepSeek-R1-0528-NVFP4-v2",
                    "nvidia/DeepSeek-V3.1-NVFP4",
                ),
            ),
            _served(
                "DeepSeek-V3.2",
                "DeepSeek-V3.2(-Exp)",
                fp8_block128="deepseek-ai/DeepSeek-V3.2",
                nvfp4=("MODEL", "nvidia/DeepSeek-V3.2-NVFP4"),
            ),
            _served("DeepSeek-V4-Flash", "DeepSeek-V4-Flash", mxfp4="deepseek-ai/DeepSeek-V4-Flash"),
            _served("DeepSeek-V4-Pro", "DeepSeek-V4-Pro", mxfp4="deepseek-ai/DeepSeek-V4-Pro"),
        ),
    ),
    "kimi": (
        "Kimi",
        (
            _served("Kimi-K2-Instruct", "Kimi-K2-Instruct", fp8_block128="moonshotai/Kimi-K2-Instruct"),
            _served("Kimi-K2-Thinking", "Kimi-K2-Thinking", int4_g32="moonshotai/Kimi-K2-Thinking"),
            _served(
                "Kimi-K2.5, K2.6, K2.7-Code",
                "Kimi-K2.5/2.6/2.7-Code",
                int4_g32=("moonshotai/Kimi-K2.5", "moonshotai/Kimi-K2.6", "moonshotai/Kimi-K2.7-Code"),
                nvfp4=("MODEL", "nvidia/Kimi-K2.5-NVFP4", "nvidia/Kimi-K2.6-NVFP4", "nvidia/Kimi-K2.7-Code-NVFP4"),
            ),
            _served("Kimi-Linear-48B-A3B", "Kimi-Linear-48B-A3B", bf16="moonshotai/Kimi-Linear-48B-A3B-Instruct"),
            _served("Moonlight-16B-A3B", "Moonlight-16B-A3B", bf16="moonshotai/Moonlight-16B-A3B-Instruct"),
        ),
    ),
    "glm": (
        "GLM",
        (
            _served(
                "GLM-4.5, 4.6, 4.7",
                "GLM-4.5/4.6/4.7",
                fp8_channel=("zai-org/GLM-4.7-FP8", "zai-org/GLM-4.5-FP8", "zai-org/GLM-4.6-FP8"),
                nvfp4=("MODEL", "nvidia/GLM-4.7-NVFP4"),
            ),
            _served("GLM-4.5-Air", "GLM-4.5-Air", bf16="zai-org/GLM-4.5-Air", fp8_channel="zai-org/GLM-4.5-Air-FP8"),
            _served("GLM-4.7-Flash", "GLM-4.7-Flash", bf16="zai-org/GLM-4.7-Flash"),
            _served(
                "GLM-5, 5.1, 5.2, 5.3",
                "GLM-5/5.1/5.2/5.3",
                fp8_block128=("zai-org/GLM-5.2-FP8", "zai-org/GLM-5-FP8", "zai-org/GLM-5.1-FP8"),
                nvfp4=("nvidia/GLM-5.2-NVFP4", "nvidia/GLM-5-NVFP4", "nvidia/GLM-5.1-NVFP4"),
            ),
        ),
    ),
    "qwen": (
        "Qwen",
        (
            _served("Qwen3-30B-A3B", "Qwen3-30B-A3B", bf16="Qwen/Qwen3-30B-A3B", fp8_block128="Qwen/Qwen3-30B-A3B-FP8"),
            _served(
                "Qwen3-235B-A22B",
                "Qwen3-235B-A22B",
                fp8_block128="Qwen/Qwen3-235B-A22B-FP8",
                nvfp4=("MODEL", "nvidia/Qwen3-235B-A22B-Instruct-2507-NVFP4"),
            ),
            _served(
                "Qwen3-Coder-480B-A35B", "Qwen3-Coder-480B", fp8_block128="Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8"
            ),
            _served("Qwen3-Next-80B-A3B", "Qwen3-Next-80B", fp8_block128="Qwen/Qwen3-Next-80B-A3B-Instruct-FP8"),
            _served("Qwen3.5-35B-A3B", "Qwen3.5/3.6-35B-A3B", fp8_block128="Qwen/Qwen3.5-35B-A3B-FP8"),
            _served("Qwen3.5-122B-A10B", "Qwen3.5-122B-A10B", fp8_block128="Qwen/Qwen3.5-122B-A10B-FP8"),
            _served(
                "Qwen3.5-397B-A17B",
                "Qwen3.5-397B-A17B",
                fp8_block128="Qwen/Qwen3.5-397B-A17B-FP8",
                nvfp4=("MODEL", "nvidia/Qwen3.5-397B-A17B-NVFP4"),
            ),
        ),
    ),
    "minimax": (
        "MiniMax",
        (
            _served(
                "MiniMax-M2, M2.1, M2.5, M2.7",
                "MiniMax-M2/M2.1/M2.5/M2.7",
                fp8_block128=(
                    "MiniMaxAI/MiniMax-M2.5",
                    "MiniMaxAI/MiniMax-M2",
                    "MiniMaxAI/MiniMax-M2.1",
                    "MiniMaxAI/MiniMax-M2.7",
                ),
            ),
        ),
    ),
    "gpt-oss": ("gpt-oss", (_served("gpt-oss-120b", "gpt-oss-120b", mxfp4="openai/gpt-oss-120b"),)),
    "others": (
        "Llama 4, LongCat, MiMo and ERNIE",
        (
            _served("Llama-4-Scout", "Llama-4-Scout", bf16="meta-llama/Llama-4-Scout-17B-16E-Instruct"),
            _served("LongCat-Flash", "LongCat-Flash", fp8_block128="meituan-longcat/LongCat-Flash-Chat-FP8"),
            _served("MiMo-V2-Flash", "MiMo-V2-Flash/V2.5", fp8_block128="XiaomiMiMo/MiMo-V2-Flash"),
            _served("ERNIE-4.5-21B-A3B", "ERNIE-4.5-21B-A3B", bf16="baidu/ERNIE-4.5-21B-A3B-PT"),
            _served("ERNIE-4.5-300B-A47B", "ERNIE-4.5-300B-A47B", bf16="baidu/ERNIE-4.5-300B-A47B-PT"),
        ),
    ),
}
