"""Masked autoencoder on a timm ViT (MAE, arXiv 2111.06377).

The encoder *is* a ``timm.models.VisionTransformer``: this file never re-implements its blocks, it only walks
through them with the masked patches left out. Patch mask convention, as in the field: 1 = masked, 0 = kept.
"""

from typing import NamedTuple

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class MAEOutput(NamedTuple):
    """What one forward of the autoencoder gives."""

    loss: Tensor
    """Scalar: mean squared error over the masked patches."""
    pred: Tensor
    """``[B, L, P*P*3]``: predicted patches, normalized when ``norm_pix_loss``."""
    mask: Tensor
    """``[B, L]``: 1 = masked, 0 = kept."""
    ids_restore: Tensor
    """``[B, L]``: position of each patch in the shuffled order."""
    latent: Tensor
    """``[B, 1 + kept, D]``: class token and kept patches after the encoder."""


class MaskedAutoencoder(nn.Module):
    """Encoder over the kept patches, a light dense decoder over all of them.

    Construction initializes encoder *and* decoder as MAE does (Xavier, fixed sin-cos position embeddings): load
    pretrained weights afterwards. Position embeddings are not trained in this stage.

    Args:
        encoder: timm ViT with a class token, without register tokens, ending in its ``norm``.
        decoder_embed_dim: embedding dimension of the decoder, divisible by 4 and by its heads.
        norm_pix_loss: normalize each target patch by its own mean and unbiased variance.

    Raises:
        ValueError: if the encoder is not such a ViT, or an embedding dimension does not divide.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        _check_encoder(encoder)
        if decoder_embed_dim % decoder_num_heads:
            raise ValueError(
                f"decoder: wanted decoder_embed_dim divisible by decoder_num_heads, "
                f"got {decoder_embed_dim} and {decoder_num_heads}"
            )
        self.encoder = encoder
        self.norm_pix_loss = norm_pix_loss
        patch_height, patch_width = encoder.patch_embed.patch_size
        grid, width = encoder.patch_embed.grid_size, encoder.embed_dim

        self.decoder_embed = nn.Linear(width, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(grid, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_height * patch_width * encoder.in_chans)

        encoder.pos_embed = nn.Parameter(sincos_pos_embed(grid, width), requires_grad=False)
        self.apply(_init_linear)
        patch_weight = encoder.patch_embed.proj.weight
        nn.init.xavier_uniform_(patch_weight.view(patch_weight.shape[0], -1))
        nn.init.normal_(encoder.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names outside the encoder that take no weight decay (timm's convention)."""
        return {"mask_token", "decoder_pos_embed"}

    def forward(self, images: Tensor, mask_ratio: float = 0.25, noise: Tensor | None = None) -> MAEOutput:
        """Mask patches, encode the rest, reconstruct.

        Args:
            images: ``[B, 3, H, W]`` at the encoder's input size.
            mask_ratio: fraction of the patches to *mask*, between 0 and 1.
            noise: ``[B, L]``, the patches of lowest noise are kept; drawn from torch's global generator if None.

        Raises:
            ValueError: if ``mask_ratio`` keeps no patch, or masks none.
        """
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return MAEOutput(self.forward_loss(images, pred, mask), pred, mask, ids_restore, latent)

    def forward_encoder(
        self, images: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, 3, H, W]`` to latent ``[B, 1 + kept, D]``, mask ``[B, L]`` and ids_restore ``[B, L]``."""
        encoder = self.encoder
        x = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]  # B L D
        if noise is None:
            noise = torch.rand(x.shape[:2], device=x.device)
        x, mask, ids_restore = random_masking(x, mask_ratio, noise)
        cls_token = encoder.cls_token + encoder.pos_embed[:, :1]
        x = torch.cat((cls_token.expand(len(x), -1, -1), x), dim=1)  # B 1+kept D
        return encoder.norm(encoder.blocks(encoder.norm_pre(x))), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent ``[B, 1 + kept, D]`` to predicted patches ``[B, L, P*P*3]``."""
        x = self.decoder_embed(latent)
        B, L = ids_restore.shape
        mask_tokens = self.mask_token.to(x.dtype).expand(B, L - (x.shape[1] - 1), -1)
        patches = torch.cat((x[:, 1:], mask_tokens), dim=1)  # shuffled order
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat((x[:, :1], patches), dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred: Tensor = self.decoder_pred(self.decoder_norm(x))
        return pred[:, 1:]

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error per patch, averaged over the masked ones; at least in fp32 under autocast."""
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
        target = self.patchify(images).to(pred.dtype)
        if self.norm_pix_loss:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)  # unbiased
            target = (target - mean) / (var + 1e-6).sqrt()
        return ((pred - target).square().mean(dim=-1) * mask).sum() / mask.sum()

    def patchify(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, L, P*P*3]``, channels last inside a patch."""
        (p, q), (h, w) = self.encoder.patch_embed.patch_size, self.encoder.patch_embed.grid_size
        B, C = images.shape[:2]
        return images.reshape(B, C, h, p, w, q).permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, p * q * C)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """``[B, L, P*P*3]`` to ``[B, 3, H, W]``: inverse of `patchify`."""
        (p, q), (h, w) = self.encoder.patch_embed.patch_size, self.encoder.patch_embed.grid_size
        B, C = len(patches), patches.shape[-1] // (p * q)
        return patches.reshape(B, h, w, p, q, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, h * p, w * q)

    def reconstruct(self, images: Tensor, output: MAEOutput) -> Tensor:
        """Predictions as pixels ``[B, 3, H, W]``, each patch with the mean and standard deviation of its target."""
        pred = output.pred.float()
        if self.norm_pix_loss:
            target = self.patchify(images)
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            pred = pred * (var + 1e-6).sqrt() + mean
        return self.unpatchify(pred)


def random_masking(x: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the patches of lowest noise (MAE, section 3: per-sample shuffling by argsort).

    Args:
        x: ``[B, L, D]``.
        mask_ratio: fraction to mask; ``int(L * (1 - mask_ratio))`` are kept.
        noise: ``[B, L]``.

    Returns:
        kept ``[B, kept, D]``, mask ``[B, L]`` (1 = masked), ids_restore ``[B, L]``.
    """
    len_keep = patches_kept(x.shape[1], mask_ratio)
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    ids_keep = ids_shuffle[:, :len_keep]
    kept = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[-1]))
    return kept, (ids_restore >= len_keep).to(noise.dtype), ids_restore


def patches_kept(patches: int, mask_ratio: float) -> int:
    """``int(L * (1 - mask_ratio))``. Raises ValueError if that keeps no patch, or masks none."""
    kept = int(patches * (1 - mask_ratio))
    if not 0 < kept < patches:
        raise ValueError(
            f"mask_ratio: wanted a fraction that keeps and masks at least one of {patches} patches, got {mask_ratio}"
        )
    return kept


def sincos_pos_embed(grid: tuple[int, int], embed_dim: int) -> Tensor:
    """Fixed 2-D position embeddings ``[1, 1 + H*W, D]``, the class token's first and zero.

    A quarter of the embedding dimension each for sin and cos of the column, then of the row (MAE's files have columns
    first).
    Raises ValueError if 4 does not divide ``embed_dim``.
    """
    if embed_dim % 4:
        raise ValueError(f"sin-cos position embeddings: wanted an embedding dimension divisible by 4, got {embed_dim}")
    omega = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    rows, columns = (torch.arange(size, dtype=torch.float64)[:, None] * omega for size in grid)
    rows = rows[:, None].expand(*grid, -1)  # H W D/4
    columns = columns[None].expand(*grid, -1)
    positions = torch.cat((columns.sin(), columns.cos(), rows.sin(), rows.cos()), dim=-1).reshape(-1, embed_dim)
    return torch.cat((torch.zeros(1, embed_dim), positions)).float()[None]


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def _check_encoder(encoder: nn.Module) -> None:
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(f"encoder: wanted a timm VisionTransformer, got {type(encoder).__name__}")
    wanted = {
        "a class token": encoder.cls_token is not None,
        "no register tokens": encoder.reg_token is None,
        "learned position embeddings, the class token's included": (
            encoder.pos_embed is not None and not encoder.no_embed_class
        ),
        "a fixed input size": not encoder.dynamic_img_size,
        "a final `norm` (global_pool='token')": isinstance(encoder.norm, nn.LayerNorm),
    }
    for what, holds in wanted.items():
        if not holds:
            raise ValueError(f"encoder: MAE pretraining wants a ViT with {what}")
