"""Networks for images and patches, as decoders of a small lifted picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.zoo.entry import Direct, Lifted, entry


def features(net: nn.Module, h: Tensor) -> Tensor:
    return net.forward_features(h)


def timm_model(name: str, side: int = 16, call=features, **options) -> nn.Module:
    import timm

    return Lifted(timm.create_model(name, pretrained=False, **options), 3, side, side, call=call)


PATCHES = {"img_size": 8, "patch_size": 4, "num_classes": 5}


@entry("timm")
def vision_transformer() -> nn.Module:
    sizes = {"embed_dim": 8, "depth": 2, "num_heads": 2, "init_values": 0.1}
    return timm_model("vit_tiny_patch16_224", 8, **PATCHES, **sizes)


@entry("timm")
def eva_rotary() -> nn.Module:
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm_model("eva02_tiny_patch14_224", 8, **PATCHES, **sizes)


def mixer_of(block: type, layer: type, **options) -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    sizes = {"embed_dim": 8, "num_blocks": 2, "block_layer": block, "mlp_layer": layer}
    return Lifted(MlpMixer(**PATCHES, **sizes, **options), 3, 8, 8, call=features)


@entry("timm")
def mixer() -> nn.Module:
    from timm.layers import Mlp
    from timm.models.mlp_mixer import MixerBlock

    return mixer_of(MixerBlock, Mlp)


@entry("timm")
def gated_mixer() -> nn.Module:
    from timm.layers import GatedMlp
    from timm.models.mlp_mixer import SpatialGatingBlock

    return mixer_of(SpatialGatingBlock, GatedMlp, mlp_ratio=2)


@entry("timm")
def swin() -> nn.Module:
    options = {"img_size": 8, "patch_size": 2, "window_size": 2, "embed_dim": 8}
    stages = {"depths": (2,), "num_heads": (2,), "num_classes": 5}
    return timm_model("swin_tiny_patch4_window7_224", 8, **options, **stages)


@entry("timm")
def swin_v2() -> nn.Module:
    options = {"img_size": 8, "patch_size": 2, "window_size": 2, "embed_dim": 8}
    stages = {"depths": (2,), "num_heads": (2,), "num_classes": 5}
    return timm_model("swinv2_tiny_window8_256", 8, **options, **stages)


def convnext_of(**options) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    return Lifted(ConvNeXt(**sizes, **options), 3, 64, 64, call=features)


@entry("timm")
def convnext() -> nn.Module:
    return convnext_of()


@entry("timm")
def convnext_v2() -> nn.Module:
    return convnext_of(use_grn=True, ls_init_value=None)


@entry("timm")
def convmixer() -> nn.Module:
    from timm.models.convmixer import ConvMixer

    return Lifted(ConvMixer(8, 2, kernel_size=3, patch_size=4, num_classes=6), 3, 8, 8)


@entry("timm")
def class_attention() -> nn.Module:
    sizes = {"embed_dim": 8, "depth": 1, "num_heads": 2}
    return timm_model("cait_xxs24_224", 8, **PATCHES, **sizes)


@entry("timm")
def mobilenet() -> nn.Module:
    return timm_model("mobilenetv2_050", 32, call=lambda net, h: net(h), num_classes=6)


@entry("timm")
def poolformer() -> nn.Module:
    from timm.models.metaformer import MetaFormer

    net = MetaFormer(depths=(1, 1), dims=(8, 8), num_classes=6)
    return Lifted(net, 3, 16, 16, call=features)


@entry("torchvision")
def swin_transformer() -> nn.Module:
    from torchvision.models import SwinTransformer

    return Lifted(SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=6), 3, 8, 8)


@entry("torchvision")
def shufflenet() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return Lifted(ShuffleNetV2([1, 1, 1], [4, 4, 8, 8, 8], num_classes=6), 3, 32, 32)


@entry("torchvision")
def deformable_convolution() -> nn.Module:
    from torchvision.ops import DeformConv2d

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset, self.conv = (
                nn.Conv2d(2, 18, 3, padding=1),
                DeformConv2d(2, 3, 3, padding=1),
            )

        def forward(self, h):
            return self.conv(h, self.offset(h))

    return Lifted(Net(), 2, 4, 4)


@entry("vit-pytorch")
def masked_autoencoder() -> nn.Module:
    """The decoder of a MAE by its parts: mask tokens at constant places."""
    from vit_pytorch import MAE, ViT

    sizes = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 1, "heads": 2, "mlp_dim": 12}
    vit = ViT(num_classes=2, channels=1, **sizes)
    net = MAE(encoder=vit, decoder_dim=8, decoder_depth=1, decoder_heads=2, decoder_dim_head=4)
    masked, kept = torch.tensor([0, 2, 3]), torch.tensor([1])

    def run(net, h):
        tokens = net.mask_token.view(1, 1, -1).expand(h.shape[0], 3, -1)
        tokens = tokens + net.decoder_pos_emb(masked)
        whole = torch.zeros(h.shape[0], 4, 8, dtype=h.dtype)
        whole[:, kept] = h + net.decoder_pos_emb(kept)
        whole[:, masked] = tokens
        return net.to_pixels(net.decoder(whole))

    return Lifted(net, 1, 8, call=run)


@entry("vit-pytorch")
def simple_vit() -> nn.Module:
    from vit_pytorch import SimpleViT

    sizes = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 1, "heads": 2, "mlp_dim": 12}
    return Lifted(SimpleViT(num_classes=6, dim_head=4, **sizes), 3, 8, 8)


@entry("vit-pytorch")
def max_vit() -> nn.Module:
    from vit_pytorch.max_vit import MaxViT

    net = MaxViT(num_classes=6, dim=8, depth=(1,), dim_head=4, window_size=2, dim_conv_stem=4)
    return Lifted(net, 3, 8, 8)


@entry("vit-pytorch")
def register_tokens() -> nn.Module:
    from vit_pytorch.simple_vit_with_register_tokens import SimpleViT

    sizes = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 1, "heads": 2, "mlp_dim": 12}
    return Lifted(SimpleViT(num_classes=6, dim_head=4, num_register_tokens=2, **sizes), 3, 8, 8)


@entry("mlp-mixer-pytorch")
def mlp_mixer() -> nn.Module:
    from mlp_mixer_pytorch import MLPMixer

    sizes = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 2, "channels": 3}
    return Lifted(MLPMixer(num_classes=6, **sizes), 3, 8, 8)


@entry("g-mlp-pytorch")
def gated_mlp() -> nn.Module:
    from g_mlp_pytorch import gMLPVision

    sizes = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 2, "ff_mult": 2}
    return Lifted(gMLPVision(num_classes=6, **sizes), 3, 8, 8)


@entry("kornia")
def blurred_picture() -> nn.Module:
    from kornia.filters import GaussianBlur2d

    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), GaussianBlur2d((3, 3), (1.0, 1.0)))
    return Lifted(net, 2, 6, 6)


@entry("kornia")
def colours() -> nn.Module:
    from kornia.color import YcbcrToRgb

    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sigmoid(), YcbcrToRgb())
    return Lifted(net, 2, 4, 4)


@entry("kornia")
def warped_picture() -> nn.Module:
    """A learned template under an affine map of the latents."""
    from kornia.geometry.transform import warp_affine

    class Template(nn.Module):
        def __init__(self):
            super().__init__()
            self.picture, self.pose = nn.Parameter(torch.randn(1, 2, 5, 5)), nn.Linear(4, 6)
            self.register_buffer("still", torch.tensor([1.0, 0, 0, 0, 1, 0]))

        def forward(self, z):
            maps = (0.1 * self.pose(z) + self.still).view(-1, 2, 3)
            picture = self.picture.expand(z.shape[0], -1, -1, -1)
            return warp_affine(picture, maps, (5, 5))

    return Direct(Template(), lambda net, z: net(z))


@entry("kornia")
def rotations() -> nn.Module:
    from kornia.geometry.conversions import axis_angle_to_rotation_matrix

    return Lifted(nn.Tanh(), 3, call=lambda net, h: axis_angle_to_rotation_matrix(net(h)))
