"""Transformers and state spaces over a few tokens made from the latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.zoo.entry import Lifted, entry

SMALL = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


def embedded(net: nn.Module, h: Tensor) -> Tensor:
    return net(inputs_embeds=h).last_hidden_state


def generic(name: str, **options) -> nn.Module:
    """A model of transformers that is made from its own configuration, over embeddings."""
    import transformers

    model = getattr(transformers, f"{name}Model")
    config = getattr(transformers, f"{name}Config")(**(SMALL | options))
    return Lifted(model(config), 4, 8, call=embedded)


@entry("transformers")
def bert() -> nn.Module:
    return generic("Bert", max_position_embeddings=8)


@entry("transformers")
def gpt2() -> nn.Module:
    return generic("GPT2", n_embd=8, n_layer=2, n_head=2, n_positions=8)


@entry("transformers")
def gpt2_eager() -> nn.Module:
    return generic(
        "GPT2", n_embd=8, n_layer=2, n_head=2, n_positions=8, attn_implementation="eager"
    )


@entry("transformers")
def llama() -> nn.Module:
    return generic("Llama", num_key_value_heads=1)


@entry("transformers")
def mistral_window() -> nn.Module:
    return generic("Mistral", num_key_value_heads=1, sliding_window=2)


@entry("transformers")
def qwen3() -> nn.Module:
    return generic("Qwen3", num_key_value_heads=1, head_dim=4)


@entry("transformers")
def gemma2() -> nn.Module:
    return generic("Gemma2", num_key_value_heads=1, head_dim=4)


@entry("transformers")
def mixtral_experts() -> nn.Module:
    return generic(
        "Mixtral", num_key_value_heads=1, num_local_experts=2, experts_implementation="eager"
    )


@entry("transformers")
def mixtral_batched_experts() -> nn.Module:
    """Experts' weights are gathered for each token."""
    options = {"num_local_experts": 2, "experts_implementation": "batched_mm"}
    return generic("Mixtral", num_key_value_heads=1, **options)


@entry("transformers")
def bloom_alibi() -> nn.Module:
    return generic("Bloom", n_layer=2, n_head=2)


@entry("transformers")
def falcon() -> nn.Module:
    return generic("Falcon", alibi=True)


@entry("transformers")
def fnet() -> nn.Module:
    return generic("FNet", max_position_embeddings=8)


@entry("transformers")
def nystromformer() -> nn.Module:
    return generic("Nystromformer", num_landmarks=2, segment_means_seq_len=4)


@entry("transformers")
def deberta_v2() -> nn.Module:
    return generic("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"])


@entry("transformers")
def mpnet() -> nn.Module:
    return generic("MPNet", max_position_embeddings=8)


@entry("transformers")
def xlnet() -> nn.Module:
    return generic("XLNet", d_model=8, n_layer=2, n_head=2, d_inner=12)


@entry("transformers")
def mamba() -> nn.Module:
    return generic("Mamba", state_size=3, expand=1, time_step_rank=2)


@entry("transformers")
def mamba2() -> nn.Module:
    return generic(
        "Mamba2", state_size=4, expand=1, num_heads=2, head_dim=4, n_groups=1, chunk_size=2
    )


@entry("transformers")
def modern_bert() -> nn.Module:
    return generic("ModernBert", pad_token_id=0, local_attention=2)


@entry("transformers")
def t5() -> nn.Module:
    """Encoder and decoder: the decoder starts from a learned token."""
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)

    def run(net, h):
        start = torch.zeros(h.shape[0], 3, dtype=torch.long)
        return net(inputs_embeds=h, decoder_input_ids=start).last_hidden_state

    return Lifted(T5Model(config), 4, 8, call=run)


@entry("transformers")
def bart_decoder() -> nn.Module:
    """A decoder that reads the latents by cross attention."""
    from transformers import BartConfig, BartModel

    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=11, d_model=8, max_position_embeddings=8, **sizes, **heads)

    def run(net, h):
        tokens = torch.arange(3).expand(h.shape[0], -1)
        return net.decoder(input_ids=tokens, encoder_hidden_states=h).last_hidden_state

    return Lifted(BartModel(config), 4, 8, call=run)


@entry("transformers")
def mae_decoder() -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_channels=1,
        decoder_num_attention_heads=2,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=2,
        decoder_intermediate_size=12,
    )
    order = torch.tensor([2, 0, 3, 1])

    def run(net, h):
        return net.decoder(h, order.expand(h.shape[0], -1)).logits

    return Lifted(ViTMAEForPreTraining(config), 3, 8, call=run)


@entry("transformers")
def perceiver() -> nn.Module:
    from transformers import PerceiverConfig, PerceiverModel

    config = PerceiverConfig(
        num_latents=3,
        d_latents=8,
        d_model=8,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
    )
    return Lifted(PerceiverModel(config), 4, 8, call=lambda net, h: net(h).last_hidden_state)


@entry("transformers")
def detr_decoder() -> nn.Module:
    """The decoder of a detection model over its object queries."""
    from transformers import DetrConfig
    from transformers.models.detr.modeling_detr import DetrDecoder

    config = DetrConfig(
        d_model=8,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=12,
        num_queries=3,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
    )
    queries = torch.randn(3, 8, dtype=torch.float64)

    def run(net, h):
        placed = queries.unsqueeze(0).repeat(h.shape[0], 1, 1)
        return net(
            inputs_embeds=torch.zeros_like(placed),
            encoder_hidden_states=h,
            object_queries_position_embeddings=placed,
            spatial_position_embeddings=torch.zeros_like(h),
        ).last_hidden_state

    return Lifted(DetrDecoder(config), 4, 8, call=run)


def sequence(**options) -> nn.Module:
    from x_transformers import ContinuousTransformerWrapper, Decoder

    layers = Decoder(dim=8, depth=1, heads=2, attn_dim_head=4, **options)
    return Lifted(ContinuousTransformerWrapper(max_seq_len=4, attn_layers=layers), 4, 8)


@entry("x-transformers")
def rotary() -> nn.Module:
    return sequence(rotary_pos_emb=True, rotary_emb_dim=4)


@entry("x-transformers")
def alibi() -> nn.Module:
    return sequence(alibi_pos_bias=True)


@entry("x-transformers")
def relative_bias() -> nn.Module:
    return sequence(rel_pos_bias=True, attn_qk_norm=True)


@entry("x-transformers")
def swiglu_rmsnorm() -> nn.Module:
    return sequence(use_rmsnorm=True, ff_glu=True, ff_swish=True)


@entry("x-transformers")
def sparse_topk() -> nn.Module:
    return sequence(attn_sparse_topk=2)


@entry("x-transformers")
def talking_heads_memory() -> nn.Module:
    return sequence(attn_pre_talking_heads=True, attn_num_mem_kv=2)


@entry("perceiver-pytorch")
def perceiver_io() -> nn.Module:
    from perceiver_pytorch import PerceiverIO

    heads = {"cross_dim_head": 4, "latent_dim_head": 4, "cross_heads": 1, "latent_heads": 2}
    net = PerceiverIO(
        dim=8, queries_dim=6, logits_dim=5, depth=1, num_latents=3, latent_dim=8, **heads
    )
    queries = torch.randn(4, 6, dtype=torch.float64)
    return Lifted(net, 4, 8, call=lambda net, h: net(h, queries=queries))


@entry("soft-moe-pytorch")
def soft_experts() -> nn.Module:
    from soft_moe_pytorch import SoftMoE

    return Lifted(SoftMoE(dim=8, seq_len=4, num_experts=2), 4, 8)


@entry("mambapy")
def state_space() -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig

    return Lifted(Mamba(MambaConfig(d_model=8, n_layers=1, d_state=3, expand_factor=1)), 4, 8)


@entry("mambapy")
def state_space_loop() -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig

    config = MambaConfig(d_model=8, n_layers=1, d_state=3, expand_factor=1, pscan=False)
    return Lifted(Mamba(config), 4, 8)


@entry("linear-attention-transformer")
def linear_attention() -> nn.Module:
    from linear_attention_transformer import LinearAttentionTransformer

    return Lifted(LinearAttentionTransformer(8, 1, 4, heads=2, dim_head=4), 4, 8)


@entry("linear-attention-transformer")
def causal_linear_attention() -> nn.Module:
    from linear_attention_transformer import LinearAttentionTransformer

    net = LinearAttentionTransformer(8, 1, 4, heads=2, dim_head=4, causal=True, blindspot_size=1)
    return Lifted(net, 4, 8)
