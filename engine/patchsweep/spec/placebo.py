"""Placebo donors: patch values as far from the base run as the source's, with no meaning."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from patchsweep.arguments import whole_number
from patchsweep.spec.interventions import Custom
from patchsweep.spec.sites import Site


def norm_matched_noise(seed: int = 0) -> Custom:
    """Return an intervention that patches in noise of the size of the source's difference.

    The value is base + s * (source - base), with random signs s of each coordinate of a site and
    layer. So its distance from the base run is the source's at every position and head, and its
    direction is random. A sweep with it is a placebo, see `results.accessor.control_level`.

    Raises:
        PlanError: `seed` is no whole number of at least 0.
    """
    seed = whole_number("seed", seed, least=0)

    def values(site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
        drawn = torch.Generator().manual_seed(zlib.crc32(f"{seed} {site.name} {layer}".encode()))
        signs = 2 * torch.randint(0, 2, base.shape[-1:], generator=drawn) - 1
        return base + signs.to(base) * (source - base)

    return Custom(values, name="noise", default_direction="denoising", version=f"signs-{seed}")
