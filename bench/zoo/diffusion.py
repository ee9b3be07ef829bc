"""Autoencoders' decoders and denoisers of diffusers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.zoo.entry import Lifted, entry

TWO = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2


def steps(h: Tensor) -> Tensor:
    """The same time for all samples."""
    return torch.full((h.shape[0],), 7, dtype=torch.long)


def decode(net: nn.Module, h: Tensor) -> Tensor:
    return net.decode(h).sample


def at_step(net: nn.Module, h: Tensor) -> Tensor:
    return net(h, steps(h)).sample


@entry("diffusers")
def autoencoder_kl() -> nn.Module:
    from diffusers import AutoencoderKL

    net = AutoencoderKL(down_block_types=DOWN, up_block_types=UP, latent_channels=4, **TWO)
    return Lifted(net, 4, 4, 4, call=decode)


@entry("diffusers")
def asymmetric_autoencoder() -> nn.Module:
    from diffusers import AsymmetricAutoencoderKL

    channels = {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8)}
    blocks = {"down_block_types": DOWN, "up_block_types": UP, "norm_num_groups": 4}
    net = AsymmetricAutoencoderKL(**channels, **blocks)
    return Lifted(net, 4, 4, 4, call=decode)


@entry("diffusers")
def autoencoder_tiny() -> nn.Module:
    from diffusers import AutoencoderTiny

    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return Lifted(AutoencoderTiny(**channels, **blocks), 4, 4, 4, call=decode)


@entry("diffusers")
def autoencoder_dc() -> nn.Module:
    from diffusers import AutoencoderDC

    blocks = ("ResBlock", "EfficientViTBlock")
    net = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    )
    return Lifted(net, 8, 3, 3, call=decode)


@entry("diffusers")
def vq_model() -> nn.Module:
    from diffusers import VQModel

    net = VQModel(down_block_types=DOWN, up_block_types=UP, num_vq_embeddings=8, **TWO)
    return Lifted(net, 3, 4, 4, call=lambda net, h: net.decode(h, force_not_quantize=True).sample)


@entry("diffusers")
def vq_model_spatial_norm() -> nn.Module:
    """MOVQ: norms whose scale and shift come from the quantised latents."""
    from diffusers import VQModel

    up = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    options = {"num_vq_embeddings": 8, "norm_type": "spatial", "latent_channels": 4}
    channels = {"block_out_channels": (32, 32)}
    net = VQModel(down_block_types=DOWN, up_block_types=up, **options, **channels)
    return Lifted(net, 4, 4, 4, call=lambda net, h: net.decode(h).sample)


@entry("diffusers")
def temporal_decoder() -> nn.Module:
    from diffusers import AutoencoderKLTemporalDecoder

    net = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",), block_out_channels=(32,), latent_channels=4
    )

    def frames(net, h):
        out = net.decode(h.flatten(0, 1), num_frames=2).sample
        return out.reshape(h.shape[0], -1)

    return Lifted(net, 2, 4, 3, 3, call=frames)


@entry("diffusers")
def autoencoder_oobleck() -> nn.Module:
    from diffusers import AutoencoderOobleck

    net = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
    )
    return Lifted(net, 4, 8, call=decode)


@entry("diffusers")
def autoencoder_wan() -> nn.Module:
    from diffusers import AutoencoderKLWan

    net = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return Lifted(net, 4, 1, 4, 4, call=decode)


@entry("diffusers")
def autoencoder_cogvideox() -> nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    net = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=1,
    )
    return Lifted(net, 4, 1, 3, 3, call=decode)


@entry("diffusers")
def unet_2d() -> nn.Module:
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **TWO,
    )
    return Lifted(net, 3, 8, 8, call=at_step)


@entry("diffusers")
def unet_2d_with_classes() -> nn.Module:
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=8,
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        time_embedding_type="fourier",
        num_class_embeds=4,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,
        **TWO,
    )

    def run(net, h):
        return net(h, steps(h), class_labels=torch.full((h.shape[0],), 2)).sample

    return Lifted(net, 3, 8, 8, call=run)


@entry("diffusers")
def unet_1d() -> nn.Module:
    from diffusers import UNet1DModel

    net = UNet1DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        extra_in_channels=64,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
    )
    return Lifted(net, 2, 32, call=at_step)


@entry("diffusers")
def unet_2d_conditional() -> nn.Module:
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        **TWO,
    )
    text = torch.randn(1, 3, 6, dtype=torch.float64)

    def run(net, h):
        return net(h, steps(h), encoder_hidden_states=text.expand(h.shape[0], -1, -1)).sample

    return Lifted(net, 4, 4, 4, call=run)


@entry("diffusers")
def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(2, 4, num_layers=2, sample_size=4, norm_num_groups=2)

    def run(net, h):
        labels = torch.full((h.shape[0],), 3)
        return net(h, timestep=steps(h), class_labels=labels).sample

    return Lifted(net, 4, 4, 4, call=run)


@entry("diffusers")
def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    net = PixArtTransformer2DModel(
        2,
        4,
        num_layers=1,
        sample_size=4,
        cross_attention_dim=8,
        caption_channels=6,
        norm_num_groups=2,
        use_additional_conditions=False,
    )
    text = torch.randn(1, 3, 6, dtype=torch.float64)

    def run(net, h):
        text_ = text.expand(h.shape[0], -1, -1)
        return net(h, encoder_hidden_states=text_, timestep=steps(h)).sample

    return Lifted(net, 4, 4, 4, call=run)


@entry("diffusers")
def stable_diffusion_3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    text, pooled = torch.randn(1, 3, 6).double(), torch.randn(1, 5).double()

    def run(net, h):
        texts = (text.expand(h.shape[0], -1, -1), pooled.expand(h.shape[0], -1))
        return net(h, *texts, timestep=steps(h)).sample

    return Lifted(net, 4, 4, 4, call=run)


@entry("diffusers")
def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )
    text, pooled = torch.randn(1, 3, 6).double(), torch.randn(1, 5).double()

    def run(net, h):
        return net(
            h,
            encoder_hidden_states=text.expand(h.shape[0], -1, -1),
            pooled_projections=pooled.expand(h.shape[0], -1),
            timestep=steps(h),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample

    return Lifted(net, 4, 4, call=run)


@entry("diffusers")
def prior_transformer() -> nn.Module:
    from diffusers import PriorTransformer

    net = PriorTransformer(
        2, 4, num_layers=1, embedding_dim=8, num_embeddings=3, additional_embeddings=4
    )
    text, pooled = torch.randn(1, 3, 8).double(), torch.randn(1, 8).double()

    def run(net, h):
        return net(
            h,
            steps(h),
            proj_embedding=pooled.expand(h.shape[0], -1),
            encoder_hidden_states=text.expand(h.shape[0], -1, -1),
        ).predicted_image_embedding

    return Lifted(net, 8, call=run)


@entry("diffusers")
def sana() -> nn.Module:
    """Linear attention."""
    from diffusers import SanaTransformer2DModel

    net = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=6,
        sample_size=4,
    )
    text = torch.randn(1, 3, 6).double()

    def run(net, h):
        return net(h, text.expand(h.shape[0], -1, -1), timestep=steps(h)).sample

    return Lifted(net, 4, 4, 4, call=run)
