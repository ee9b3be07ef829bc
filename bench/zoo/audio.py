"""Neural codecs, vocoders and networks along time."""

from __future__ import annotations

import torch
from torch import nn

from bench.zoo.entry import Lifted, entry


@entry("encodec")
def seanet() -> nn.Module:
    from encodec.modules import SEANetDecoder

    net = SEANetDecoder(dimension=4, n_filters=2, ratios=[2, 2], n_residual_layers=1, lstm=1)
    return Lifted(net, 4, 8)


@entry("encodec")
def seanet_without_recurrence() -> nn.Module:
    from encodec.modules import SEANetDecoder

    options = {"lstm": 0, "causal": True, "norm": "weight_norm", "true_skip": True}
    net = SEANetDecoder(dimension=4, n_filters=2, ratios=[2, 2], n_residual_layers=1, **options)
    return Lifted(net, 4, 8)


@entry("vocos")
def inverse_transform() -> nn.Module:
    from vocos.heads import ISTFTHead
    from vocos.models import VocosBackbone

    backbone = VocosBackbone(input_channels=3, dim=8, intermediate_dim=12, num_layers=1)
    return Lifted(nn.Sequential(backbone, ISTFTHead(dim=8, n_fft=8, hop_length=4)), 3, 5)


@entry("snac")
def decoder_without_noise() -> nn.Module:
    from snac.layers import Decoder

    net = Decoder(4, channels=16, rates=[2, 2], noise=False, attn_window_size=None)
    return Lifted(net, 4, 8)


@entry("snac")
def decoder_with_noise() -> nn.Module:
    from snac.layers import Decoder

    net = Decoder(4, channels=16, rates=[2, 2], noise=True, attn_window_size=None)
    return Lifted(net, 4, 8)


@entry("transformers")
def hifi_gan() -> nn.Module:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=4,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    return Lifted(SpeechT5HifiGan(config), 8, 4)


@entry("transformers")
def encodec_decoder() -> nn.Module:
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        num_filters=2, hidden_size=4, upsampling_ratios=[2, 2], codebook_size=8, codebook_dim=4
    )
    return Lifted(EncodecModel(config).decoder, 4, 6)


@entry("transformers")
def dac_decoder() -> nn.Module:
    from transformers import DacConfig, DacModel

    config = DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=8,
        hidden_size=8,
        downsampling_ratios=[2, 2],
        upsampling_ratios=[2, 2],
        codebook_size=8,
        codebook_dim=4,
    )
    return Lifted(DacModel(config).decoder, 8, 6)


@entry("transformers")
def univnet() -> nn.Module:
    """A vocoder whose kernels are predicted from the spectrogram; its noise is an argument."""
    from transformers import UnivNetConfig, UnivNetModel

    config = UnivNetConfig(
        model_in_channels=4,
        model_hidden_channels=4,
        num_mel_bins=5,
        resblock_kernel_sizes=[3],
        resblock_stride_sizes=[2],
        resblock_dilation_sizes=[[1]],
        kernel_predictor_num_blocks=1,
        kernel_predictor_hidden_channels=4,
    )
    noise = torch.randn(1, 4, 4, dtype=torch.float64)

    def run(net, h):
        return net(input_features=h, noise_sequence=noise.expand(h.shape[0], -1, -1)).waveforms

    return Lifted(UnivNetModel(config), 4, 5, call=run)


@entry("transformers")
def patch_time_series() -> nn.Module:
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=2,
        context_length=8,
        patch_length=4,
        patch_stride=4,
        d_model=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=12,
        prediction_length=3,
        loss="mse",
    )
    return Lifted(
        PatchTSTForPrediction(config), 8, 2, call=lambda net, h: net(h).prediction_outputs
    )


@entry("conformer")
def conformer() -> nn.Module:
    from conformer import Conformer

    sizes = {"dim": 8, "depth": 1, "dim_head": 4, "heads": 2, "conv_kernel_size": 3}
    return Lifted(Conformer(**sizes), 4, 8)


@entry("pytorch-tcn")
def causal_convolutions() -> nn.Module:
    from pytorch_tcn import TCN

    net = TCN(3, [4, 4], kernel_size=3, causal=True, use_skip_connections=True)
    return Lifted(net, 3, 8)


@entry("pytorch-tcn")
def gated_convolutions() -> nn.Module:
    from pytorch_tcn import TCN

    net = TCN(3, [4, 4], kernel_size=3, causal=False, use_norm="layer_norm", use_gate=True)
    return Lifted(net, 3, 8)
