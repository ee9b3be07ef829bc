"""Networks from pictures to pictures: segmentation, medical images."""

from __future__ import annotations

from torch import nn

from bench.zoo.entry import Lifted, entry


def smp(kind: str, side: int = 32, **options) -> nn.Module:
    """A model without pretrained weights that draws two classes."""
    import segmentation_models_pytorch

    settings = {"encoder_name": "timm-mobilenetv3_small_minimal_100", "encoder_weights": None}
    model = getattr(segmentation_models_pytorch, kind)
    net = model(**(settings | options), in_channels=3, classes=1)
    # A thumbnail of the mask: every output costs the oracle a pass.
    pool = nn.AdaptiveAvgPool2d(6)
    return Lifted(nn.Sequential(net, pool), 3, side, side)


@entry("segmentation-models-pytorch")
def unet() -> nn.Module:
    return smp("Unet", decoder_channels=(32, 32, 16, 16, 16), decoder_attention_type="scse")


@entry("segmentation-models-pytorch")
def unet_plus_plus() -> nn.Module:
    return smp("UnetPlusPlus", decoder_channels=(16, 8, 8, 8, 4))


@entry("segmentation-models-pytorch")
def feature_pyramid() -> nn.Module:
    return smp("FPN", 64, decoder_pyramid_channels=16, decoder_segmentation_channels=32)


@entry("segmentation-models-pytorch")
def linknet() -> nn.Module:
    return smp("Linknet")


@entry("segmentation-models-pytorch")
def manet() -> nn.Module:
    return smp("MAnet", decoder_channels=(16, 8, 8, 8, 4), decoder_pab_channels=4)


@entry("segmentation-models-pytorch")
def pyramid_pooling() -> nn.Module:
    return smp("PSPNet", psp_out_channels=16)


@entry("segmentation-models-pytorch")
def deeplab() -> nn.Module:
    return smp("DeepLabV3", decoder_channels=16, encoder_output_stride=16)


@entry("segmentation-models-pytorch")
def segformer() -> nn.Module:
    return smp("Segformer", encoder_name="mit_b0", decoder_segmentation_channels=16)


@entry("monai")
def autoencoder_kl() -> nn.Module:
    from monai.networks.nets import AutoencoderKL

    net = AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(8, 8),
        num_res_blocks=(1, 1),
        attention_levels=(False, True),
        latent_channels=3,
        norm_num_groups=4,
    )
    return Lifted(net, 3, 4, 4, call=lambda net, h: net.decode(h))


@entry("monai")
def spade_autoencoder() -> nn.Module:
    import torch
    from monai.networks.nets import SPADEAutoencoderKL

    net = SPADEAutoencoderKL(
        spatial_dims=2,
        label_nc=2,
        in_channels=1,
        out_channels=1,
        channels=(8, 8),
        num_res_blocks=(1, 1),
        attention_levels=(False, False),
        latent_channels=3,
        norm_num_groups=4,
        spade_intermediate_channels=4,
    )
    map_ = torch.rand(1, 2, 8, 8, dtype=torch.float64)
    return Lifted(
        net, 3, 4, 4, call=lambda net, h: net.decode(h, map_.expand(h.shape[0], -1, -1, -1))
    )


@entry("monai")
def diffusion_unet() -> nn.Module:
    from monai.networks.nets import DiffusionModelUNet

    net = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(8, 8),
        num_res_blocks=1,
        attention_levels=(False, True),
        norm_num_groups=4,
        num_head_channels=4,
    )
    return Lifted(net, 1, 8, 8, call=lambda net, h: net(h, h.new_full((h.shape[0],), 7.0)))


@entry("monai")
def unet_of_residuals() -> nn.Module:
    from monai.networks.nets import UNet

    net = UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(4, 8, 8),
        strides=(2, 2),
        num_res_units=1,
    )
    return Lifted(net, 1, 8, 8)


@entry("monai")
def generator() -> nn.Module:
    from monai.networks.nets import Generator

    net = Generator(
        latent_shape=(4,),
        start_shape=(4, 2, 2),
        channels=(4, 4, 1),
        strides=(2, 2, 1),
        num_res_units=1,
    )
    return Lifted(net, 4)


@entry("monai")
def variational_autoencoder() -> nn.Module:
    from monai.networks.nets import VarAutoEncoder

    net = VarAutoEncoder(
        spatial_dims=2,
        in_shape=(1, 8, 8),
        out_channels=1,
        latent_size=4,
        channels=(4, 4),
        strides=(2, 2),
    )
    return Lifted(net, 4, call=lambda net, h: net.decode_forward(h))


@entry("monai")
def segmentation_resnet() -> nn.Module:
    from monai.networks.nets import SegResNet

    options = {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)}
    return Lifted(SegResNet(spatial_dims=2, in_channels=1, out_channels=1, **options), 1, 8, 8)


@entry("monai")
def volumes() -> nn.Module:
    from monai.networks.nets import VNet

    net = nn.Sequential(VNet(spatial_dims=2, in_channels=1, out_channels=1), nn.AvgPool2d(4))
    return Lifted(net, 1, 32, 32)


@entry("monai")
def vq_vae() -> nn.Module:
    from monai.networks.nets import VQVAE

    net = VQVAE(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(8, 8),
        num_res_channels=(4, 4),
        num_res_layers=1,
        downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
        upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
        num_embeddings=8,
        embedding_dim=4,
    )
    return Lifted(net, 4, 2, 2, call=lambda net, h: net.decode(h))


@entry("torchvision")
def dilated_pyramid() -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    return Lifted(DeepLabHead(4, 2, (2, 3)), 4, 4, 4)
