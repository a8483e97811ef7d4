"""The JSON files that a new checkpoint has beside its weights: config.json and the index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ep2tp.checkpoint.conversion import Job
from ep2tp.model.families import config_parts
from ep2tp.model.sharding import ShardPlan


def new_config(config: Mapping[str, Any], plan: ShardPlan) -> bytes:
    """config.json with the padded sizes, and nothing else changed."""
    changed: dict[str, Any] = json.loads(json.dumps(config))
    for part in config_parts(changed):
        for field, (before, after) in plan.fields.items():
            if part.get(field) == before:
                part[field] = after  # type: ignore[index]
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def new_index(jobs: Sequence[Job], had_index: bool) -> bytes | None:
    """The index of a padded checkpoint's files; None for a single file that had none."""
    if len(jobs) == 1 and not had_index:
        return None
    weight_map = dict(sorted((origin.tensor.name, job.whole) for job in jobs for origin, _ in job.items))
    total = sum(recipe.targets[0].size for job in jobs for _, recipe in job.items)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()
