"""Settings of hypothesis for all tests: that the machine is busy is no failure of a test."""

from __future__ import annotations

from contextlib import suppress

with suppress(ImportError):  # the GPU tests run where it may be missing
    from hypothesis import HealthCheck, settings

    settings.register_profile("ep2tp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("ep2tp")
