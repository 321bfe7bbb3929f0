"""Matrix products in bfloat16 where the processor multiplies them, else in float32.

Without such instructions a bfloat16 product on a CPU takes ten times as long as a float32 one.
"""

from __future__ import annotations

import torch


def has_bfloat16() -> bool:
    """Tell whether the processor multiplies bfloat16 itself (AVX-512 BF16 or AMX)."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def fast_products() -> torch.autocast:
    """Return a context in which a model runs at the speed that the processor has."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())
