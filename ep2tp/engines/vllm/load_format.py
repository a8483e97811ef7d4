"""Makes ``--load-format ep2tp`` known to vLLM, once vLLM imports its model loaders. Imports nothing itself."""

from __future__ import annotations

import importlib

import wrapt

_LOADERS = "vllm.model_executor.model_loader"
_OURS = "ep2tp.engines.vllm.ranks_loader"  # registers itself


def register() -> None:
    """Register the load format. Idempotent; a process that loads no model imports nothing because of it."""
    wrapt.register_post_import_hook(lambda module: importlib.import_module(_OURS), _LOADERS)
