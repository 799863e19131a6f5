"""The losses of the DynamicVAE: L1 + perceptual terms + KL + a hinge PatchGAN weighted by the gradients (VQGAN, LDM).

Reduction, everywhere: the sum over an image divided by its 3HW values, averaged over the batch. So the KL weight 1e-6
means what it means in the latent-diffusion code (both sides summed there), at any image size; and the KL counts every
latent code once, not every cell that copies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from d2it.diffusion.grains import grain_weights
from d2it.models.dvae import VAEOutput, group_norm
from d2it.models.efficientnet import FeatureDistance
from d2it.models.lpips import LPIPS


@dataclass
class VAELossConfig:
    """Configuration of a `VAELoss`.

    Args:
        perceptual_weight: of LPIPS, used where `lpips_path` is given.
        lpips_path: a file or folder for `LPIPS.from_path`; None leaves the term out.
        lpips_check: whether its files must have the hashes of the released ones.
        features: network of a perceptual term that needs no download, a name of `d2it.models.efficientnet.LITE`; None
            leaves the term out.
        features_weight: of that term.
        kl_weight: of the KL, reduced as the module's docstring states.
        disc_weight: of the adversarial term, before the adaptive weight.
        disc_start: first step (counted from 0) with an adversarial term; None is never.
        disc_channels: width of the discriminator.
        disc_layers: its depth.
    """

    perceptual_weight: float = 1.0
    lpips_path: str | None = None
    lpips_check: bool = True
    features: str | None = None
    features_weight: float = 0.2
    kl_weight: float = 1e-6
    disc_weight: float = 0.5
    disc_start: int | None = 50_001
    disc_channels: int = 64
    disc_layers: int = 3


class PatchDiscriminator(nn.Module):
    """pix2pix's PatchGAN: (B, 3, H, W) -> (B, 1, h, w) scores of overlapping patches (70 x 70 for 3 layers).

    GroupNorm in the place of BatchNorm: a score depends on its own image alone, on one rank or many.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        width = channels
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            out = channels * min(2**i, 8)
            parts += [
                nn.Conv2d(width, out, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                group_norm(out),
                nn.LeakyReLU(0.2),
            ]
            width = out
        parts.append(nn.Conv2d(width, 1, 4, padding=1))
        self.parts = nn.Sequential(*parts)
        for part in self.parts:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.parts(images)


class VAELoss(nn.Module):
    """Generator and discriminator losses of a `DynamicVAE`; the trainable part is `discriminator`."""

    def __init__(self, config: VAELossConfig) -> None:
        super().__init__()
        self.config = config
        self.discriminator = (
            None if config.disc_start is None else PatchDiscriminator(config.disc_channels, config.disc_layers)
        )
        self.features = None if config.features is None else FeatureDistance(config.features)
        self.lpips = None if config.lpips_path is None else LPIPS.from_path(config.lpips_path, check=config.lpips_check)

    def adversarial(self, step: int) -> bool:
        """Whether there is an adversarial term at `step`."""
        return self.config.disc_start is not None and step >= self.config.disc_start

    def generator(
        self,
        images: Tensor,
        output: VAEOutput,
        *,
        step: int,
        last_layer: Tensor,
        code_sizes: Sequence[int],
    ) -> dict[str, Tensor]:
        """The VAE's loss under "loss", and its parts, scalars without a host synchronisation.

        It leaves no gradient in the discriminator.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            output: of the VAE's forward.
            step: from `disc_start` on there is an adversarial term.
            last_layer: `DynamicVAE.last_layer`.
            code_sizes: `DynamicVAE.config.code_sizes`.
        """
        config = self.config
        reconstruction = output.reconstruction.float()
        l1 = (images - reconstruction).abs().mean()
        parts = {"l1": l1.detach()}
        nll = l1
        if self.lpips is not None:
            lpips = self.lpips(images, reconstruction).mean()
            parts["lpips"] = lpips.detach()
            nll = nll + config.perceptual_weight * lpips
        if self.features is not None:
            features = self.features(images, reconstruction).mean()
            parts["features"] = features.detach()
            nll = nll + config.features_weight * features
        kl = kl_per_value(output, code_sizes, values=images[0].numel())
        parts["kl"] = kl.detach()
        loss = nll + config.kl_weight * kl
        if self.adversarial(step):
            gan = -self._scores(reconstruction).mean()
            weight = config.disc_weight * adaptive_weight(nll, gan, last_layer)
            parts |= {"gan": gan.detach(), "gan_weight": weight}
            loss = loss + weight * gan
        return {"loss": loss, **parts}

    def discriminate(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """The discriminator's hinge loss under "loss", and the mean scores of both sides.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstruction: of the VAE, of the same shape.
        """
        both = torch.cat([images, reconstruction.detach().to(images.dtype)])
        real, fake = self._own()(both).float().chunk(2)
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return {"loss": loss, "real": real.detach().mean(), "fake": fake.detach().mean()}

    def _scores(self, images: Tensor) -> Tensor:
        module = self._own()
        return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, images)

    def _own(self) -> nn.Module:
        if self.discriminator is None:
            raise ValueError("disc_start is None: this VAELoss has no discriminator")
        return self.discriminator


def kl_per_value(output: VAEOutput, code_sizes: Sequence[int], *, values: int) -> Tensor:
    """KL to the standard normal in nats, summed over the codes of an image, divided by its `values`, batch mean."""
    kl = 0.5 * (output.mean.square() + output.logvar.exp() - 1 - output.logvar)
    weight = grain_weights(output.grain_map, code_sizes=code_sizes)
    return (kl * weight).sum(dim=(1, 2, 3)).mean() / values


def adaptive_weight(nll: Tensor, gan: Tensor, last_layer: Tensor) -> Tensor:
    """|grad nll| / (|grad gan| + 1e-4) at the decoder's last layer, at most 1e4 (VQGAN, Eq. 7). Detached."""
    (nll_grad,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (gan_grad,) = torch.autograd.grad(gan, last_layer, retain_graph=True)
    return (nll_grad.float().norm() / (gan_grad.float().norm() + 1e-4)).clamp(0, 1e4).detach()
