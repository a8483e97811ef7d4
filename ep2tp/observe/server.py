"""A running server: what its own endpoints say.

SGLang answers ``/server_info`` (older: ``/get_server_info``) with its resolved arguments. vLLM does so in development
mode only (``VLLM_SERVER_DEV_MODE=1``); otherwise ``system_fingerprint`` of an answer names its parallel sizes, which
takes a request for one token.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

from ep2tp.errors import SourceError
from ep2tp.observe.evidence import Evidence, Reading, Strength
from ep2tp.observe.layouts import vllm_layout
from ep2tp.observe.sglang_log import server_args_reading

_TIMEOUT_S = 20.0
_LARGEST_ANSWER = 16 << 20
_FINGERPRINT = re.compile(r"^vllm-(?P<version>[^-]+)(?P<sizes>(?:-(?:tp|pp|dp)\d+)*(?:-ep)?)-(?:[0-9a-f]{8}|nohash)$")


def read_server(url: str) -> Iterator[Evidence]:
    """Evidence from a server.

    Args:
        url: its base, such as ``http://127.0.0.1:8000``.

    Raises:
        SourceError: it is no URL, or nothing that speaks HTTP answers there.
    """
    _check(url)
    base = url.rstrip("/").removesuffix("/v1")
    info = _ask(base, "/server_info?config_format=json") or _ask(base, "/get_server_info")
    if info and isinstance(info.get("vllm_config"), dict):
        try:
            yield _vllm_config(info["vllm_config"])
        except (AttributeError, TypeError, ValueError) as error:
            raise SourceError(f"{url}: /server_info tells no parallel sizes as vLLM's does ({error})") from None
        return
    if info and "tp_size" in info:
        yield from _sglang_info(info)
        return
    if not (models := _ask(base, "/v1/models")):
        raise SourceError(
            f"{url}: answers neither /server_info nor /v1/models; name the base URL of a vLLM or SGLang server"
        )
    yield from _fingerprint(base, models)


def _check(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        is_url = parts.hostname and parts.port != 0 and url.isprintable() and " " not in url
        why = "" if is_url else "no host, port 0, or a space"
    except ValueError as error:
        why = str(error)
    if why:
        raise SourceError(f"{url}: not a server's URL ({why}); name its base, such as http://127.0.0.1:8000")


def _vllm_config(config: dict[str, Any]) -> Evidence:
    parallel = config.get("parallel_config", {})
    names = ("tensor_parallel_size", "data_parallel_size", "prefill_context_parallel_size")
    tp, dp, pcp = (int(parallel.get(name) or 1) for name in names)
    is_expert_parallel = bool(parallel.get("enable_expert_parallel"))
    backend = parallel.get("all2all_backend")
    sizes = f"tensor_parallel_size={tp}, data_parallel_size={dp}, enable_expert_parallel={is_expert_parallel}"
    text = f"/server_info: {sizes}, all2all_backend={backend}"
    return Evidence(vllm_layout(tp, dp, pcp, is_expert_parallel, backend), text, None, "vllm")


def _sglang_info(info: dict[str, Any]) -> Iterator[Evidence]:
    if reading := server_args_reading(info):
        names = ("version", "tp_size", "ep_size", "moe_a2a_backend", "attn_dp_size", "moe_dp_size")
        text = "/server_info: " + ", ".join(f"{name}={info[name]}" for name in names if name in info)
        yield Evidence(reading, text, None, "sglang")


def _fingerprint(base: str, models: dict[str, Any]) -> Iterator[Evidence]:
    model = next((entry.get("id") for entry in models.get("data", []) if isinstance(entry, dict)), None)
    answer = _ask(base, "/v1/completions", {"model": model, "prompt": [1], "max_tokens": 1}) or {}
    fingerprint = str(answer.get("system_fingerprint") or "")
    if match := _FINGERPRINT.match(fingerprint):
        sizes = {name: int(size) for name, size in re.findall(r"-(tp|dp)(\d+)", match["sizes"])}
        reading = vllm_layout(sizes.get("tp", 1), sizes.get("dp", 1), 1, match["sizes"].endswith("-ep"))
        yield Evidence(reading, f"system_fingerprint {fingerprint}", None, "vllm")
        return
    says = "the server does not tell its parallel sizes; start vLLM with VLLM_SERVER_DEV_MODE=1, or give its boot log"
    yield Evidence(Reading(says, strength=Strength.NOTE), fingerprint or "(no system_fingerprint)")


def _ask(base: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The JSON object that an endpoint answers with; None where it is missing or answers otherwise."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            found = json.loads(answer.read(_LARGEST_ANSWER))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise SourceError(
                f"{base}{path}: the server wants an API key ({error.code}); give its boot log instead"
            ) from None
        return None
    except (OSError, urllib.error.URLError) as error:
        raise SourceError(f"{base}: no server answers ({getattr(error, 'reason', error)})") from None
    except HTTPException as error:
        raise SourceError(
            f"{base}: what answers there does not speak HTTP ({type(error).__name__}: {error}); name the server's port"
        ) from None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
