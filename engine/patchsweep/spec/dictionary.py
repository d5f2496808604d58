"""`Dictionary`: the latents of a sparse autoencoder or a transcoder at one place of a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep.arguments import whole_number
from patchsweep.errors import ConfigError
from patchsweep.spec.dictionary_files import check_weights, read_dictionary
from patchsweep.spec.plan import ModelShape
from patchsweep.spec.sites import SITES, Site

_WEIGHTS = ("encoder", "decoder", "encoder_bias", "decoder_bias", "threshold")
# sites whose activations a decoder may write
PLACES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")


@dataclass(frozen=True)
class Dictionary:
    """A sparse autoencoder, or a transcoder, at one layer of a model.

    The latents of an activation `x` `[width]` are `act(x @ encoder + encoder_bias)`, `[latent]`,
    and their sum in the model `latents @ decoder + decoder_bias`. `act` is ReLU; with `threshold`
    it keeps what lies above (JumpReLU), with `k` the `k` largest.

    An autoencoder reads and writes one site. A transcoder reads another place than it writes: the
    MLP's input, say, and its output. What a dictionary does not explain (the error term, a
    transcoder's skip connection among it) is kept by a patch of one latent.

    Raises:
        ConfigError: shapes do not fit each other, a value is not finite, or the site is none that
            a dictionary can write.
    """

    encoder: Tensor = field(repr=False)  # [width, latent]
    decoder: Tensor = field(repr=False)  # [latent, width written]
    encoder_bias: Tensor = field(repr=False)  # [latent]
    decoder_bias: Tensor = field(repr=False)  # [width written]
    site: str  # that the decoder writes; of z all heads side by side
    layer: int
    # what the encoder reads: None: the site; or a hook point, such as
    # blocks.{layer}.ln2.hook_normalized
    reads: str | None = None
    threshold: Tensor | None = field(default=None, repr=False)  # [latent]
    k: int | None = None
    name: str = ""  # default: site and layer, such as resid_post.12

    def __post_init__(self) -> None:
        if self.site not in PLACES:
            raise ConfigError(
                f"site={self.site!r} is none that a dictionary writes; use {', '.join(PLACES)}"
            )
        whole_number("layer", self.layer, least=0, error=ConfigError)
        weights = {name: getattr(self, name) for name in _WEIGHTS}
        check_weights("the dictionary", {k: x for k, x in weights.items() if x is not None})
        if self.k is not None:
            whole_number("k", self.k, least=1, most=self.n_latents, error=ConfigError)
            if self.threshold is not None:
                raise ConfigError(
                    f"k={self.k} beside a threshold: one of the two keeps latents; leave k out"
                )
        object.__setattr__(self, "name", self.name or f"{self.site}.{self.layer}")

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        *,
        site: str | None = None,
        layer: int | None = None,
        reads: str | None = None,
        k: int | None = None,
        name: str = "",
    ) -> Dictionary:
        """Read a dictionary from a file, or from its folder; in fp32.

        Two layouts are known. **SAELens**: `sae_weights.safetensors` with W_enc, W_dec, b_enc,
        b_dec, threshold, beside `cfg.json`, which says the place, the architecture (standard,
        jumprelu, topk, and their transcoders), k and whether b_dec is taken from the input first
        (`apply_b_dec_to_input`). **Gemma Scope**: `params.npz`, or `params.safetensors` of its
        second release, with the same arrays in capitals or not; its file says no place.

        Args:
            site: the site that it writes; default: that of `cfg.json`.
            layer: its layer; default as for `site`.
            reads: for a transcoder: a site, or a hook point's full name with `{layer}`.
            k: for top-k dictionaries whose file does not say it.
            name: what results call it; default: site and layer.

        Raises:
            ConfigError: the file is missing, is no dictionary of a known layout, needs a
                normalisation of activations at run time, or says no place.
        """
        return cls(**read_dictionary(path, site, layer, reads, k), name=name)

    @property
    def n_latents(self) -> int:
        return self.encoder.shape[-1]

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads another place than it writes."""
        return self.reads is not None and self.reads != self.site

    @property
    def hook(self) -> str:
        """Name of the hook point that the encoder reads."""
        reads = self.reads or self.site
        if reads in SITES:
            return SITES[reads].hook_name(self.layer)
        return reads.replace("{layer}", str(self.layer))

    def on(self, device: torch.device) -> Dictionary:
        """Return the dictionary with its weights on `device`."""
        weights = {name: getattr(self, name) for name in _WEIGHTS}
        return replace(self, **{k: x.to(device) for k, x in weights.items() if x is not None})

    def encode(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes latent"]:
        """Return the latents' activations, fp32, at least 0."""
        before = x.to(self.encoder) @ self.encoder + self.encoder_bias
        if self.k is not None:
            largest = before.topk(self.k, dim=-1)
            kept = torch.zeros_like(before)
            return kept.scatter_(-1, largest.indices, largest.values.relu())
        active = before.relu()
        return active if self.threshold is None else active * (before > self.threshold)

    def decode(self, latents: Float[Tensor, "*axes latent"]) -> Float[Tensor, "*axes width_out"]:
        """Return the reconstruction from latents, without a skip connection."""
        return latents.to(self.decoder) @ self.decoder + self.decoder_bias


def check_dictionaries(
    given: Dictionary | Sequence[Dictionary], shape: ModelShape, hooks: Collection[str]
) -> tuple[Dictionary, ...]:
    """Return dictionaries that fit a model of `shape` with the hook points `hooks`.

    Raises:
        ConfigError: there is none, two have one name, or one has another width, or a layer or
            place that the model has not.
    """
    if isinstance(given, Dictionary):
        given = [given]
    listed = not isinstance(given, str) and isinstance(given, Sequence)
    if not listed or not given or not all(isinstance(x, Dictionary) for x in given):
        raise ConfigError(
            f"dictionaries={given!r} must be a list of Dictionary; read one with "
            "Dictionary.from_safetensors('sae_weights.safetensors')"
        )
    names = [x.name for x in given]
    if len(set(names)) < len(names):
        raise ConfigError(f"dictionaries have the names {names}; give each its own, with name=")
    for one in given:
        if one.layer >= shape.n_layers:
            raise ConfigError(
                f"dictionary {one.name} is of layer {one.layer}, past the last layer "
                f"{shape.n_layers - 1} of the model; load one of this model, or give its layer"
            )
        _check_width(one, "decoder", SITES[one.site], one.decoder.shape[-1], shape)
        reads = one.reads or one.site
        read = SITES.get(reads)
        if read is None and one.hook not in hooks:
            raise ConfigError(
                f"dictionary {one.name} reads {reads!r}, which is no hook point of the model; use "
                "a site, or a name such as blocks.{layer}.ln2.hook_normalized"
            )
        _check_width(one, "encoder", read, one.encoder.shape[0], shape)
    return tuple(given)


def _check_width(
    one: Dictionary, what: str, site: Site | None, width: int, shape: ModelShape
) -> None:
    """Raise unless `width` is that of the vectors at `site` (None: of the residual stream)."""
    found = None if site is None else shape.values(site, 1)
    wanted = shape.d_model if found is None else found[-1]
    if width != wanted:
        place = "the residual stream" if site is None else site.name
        raise ConfigError(
            f"the {what} of dictionary {one.name} has the width {width}, and {place} of this model "
            f"has {wanted}; load a dictionary of this model"
        )
