"""What all tests share: the same generated examples in every run, so that a green suite stays green."""

from __future__ import annotations

from hypothesis import settings

# new examples are looked for with --hypothesis-profile=explore
settings.register_profile("explore", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")
