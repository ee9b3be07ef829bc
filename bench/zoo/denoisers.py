"""Denoising networks of denoising-diffusion-pytorch and x-unet."""

from __future__ import annotations

from torch import Tensor, nn

from bench.zoo.entry import Lifted, entry


def at_time(net: nn.Module, h: Tensor) -> Tensor:
    return net(h, h.new_full((h.shape[0],), 7.0))


@entry("denoising-diffusion-pytorch")
def unet() -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    net = Unet(8, dim_mults=(1, 2), channels=1, attn_dim_head=4, attn_heads=2, flash_attn=False)
    return Lifted(net, 1, 8, 8, call=at_time)


@entry("denoising-diffusion-pytorch")
def unet_one_dimensional() -> nn.Module:
    from denoising_diffusion_pytorch import Unet1D

    net = Unet1D(8, dim_mults=(1, 2), channels=2, attn_dim_head=4, attn_heads=2)
    return Lifted(net, 2, 16, call=at_time)


@entry("denoising-diffusion-pytorch")
def karras_unet() -> nn.Module:
    from denoising_diffusion_pytorch import KarrasUnet

    net = KarrasUnet(
        image_size=8,
        dim=8,
        dim_max=8,
        channels=1,
        num_downsamples=1,
        num_blocks_per_stage=1,
        attn_res=(4,),
        attn_dim_head=4,
        fourier_dim=4,
    )
    return Lifted(net, 1, 8, 8, call=lambda net, h: net(h, time=h.new_full((h.shape[0],), 0.3)))


@entry("x-unet")
def x_unet() -> nn.Module:
    from x_unet import XUnet

    net = XUnet(
        dim=8,
        channels=2,
        dim_mults=(1, 2),
        num_blocks_per_stage=(1, 1),
        num_self_attn_per_stage=(0, 1),
        nested_unet_depths=(1, 1),
        consolidate_upsample_fmaps=True,
    )
    return Lifted(net, 2, 8, 8)
