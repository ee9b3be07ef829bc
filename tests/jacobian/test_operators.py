"""PyTorch's operators on its own samples: each is right or refused in one line."""

from __future__ import annotations

import pytest

pytest.importorskip("expecttest", reason="PyTorch's samples need it")

from tests.jacobian.one_operator import NOT_JUDGED, REFUSED, RIGHT  # noqa: E402
from tests.jacobian.operator_samples import OPERATORS, verdicts_of  # noqa: E402

ROUNDS = "rounds to a coarser type, whose steps are as large as the differences"
SPARSE = "takes matrices that are stored sparsely"
# What differences of float64 values cannot judge.
UNJUDGED = {
    "bfloat16": ROUNDS,
    "half": ROUNDS,
    "chalf": ROUNDS,
    "float": ROUNDS,
    "cfloat": ROUNDS,
    "round.decimals_3": "jumps at every thousandth, which a difference of the loss meets",
    "sparse.mm.reduce": SPARSE,
    "sparse.sampled_addmm": SPARSE,
}
# The operators that real values may be refused for. Most draw at random, normalise by batch
# statistics or with a weight that depends on z, ask for values (combinations: on torch 2.11), or
# have no second derivative.
MAY_BE_REFUSED = frozenset(
    """
    _batch_norm_with_update _native_batch_norm_legit _segment_reduce.lengths _segment_reduce.offsets
    bernoulli block_diag combinations linalg.eig linalg.eigvals linalg.lstsq
    linalg.lstsq.grad_oriented masked_scatter masked_select native_batch_norm
    native_dropout_backward native_group_norm native_layer_norm nextafter
    nn.functional.alpha_dropout nn.functional.batch_norm nn.functional.ctc_loss
    nn.functional.dropout nn.functional.dropout2d nn.functional.dropout3d
    nn.functional.embedding_bag nn.functional.feature_alpha_dropout.with_train
    nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d
    nn.functional.gaussian_nll_loss nn.functional.group_norm nn.functional.instance_norm
    nn.functional.layer_norm nn.functional.linear_cross_entropy.chunked
    nn.functional.linear_cross_entropy.chunked_none nn.functional.multi_head_attention_forward
    nn.functional.multi_margin_loss nn.functional.multilabel_margin_loss nn.functional.rms_norm
    nn.functional.rrelu nn.functional.soft_margin_loss normal normal.number_mean pca_lowrank
    svd_lowrank to_sparse torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    """.split()
)
SHARDS = 20


@pytest.mark.parametrize("shard", range(SHARDS))
def test_operators_are_right_or_refused(shard, tally):
    faults = []
    for name in list(OPERATORS)[shard::SHARDS]:
        if name in UNJUDGED:
            continue
        for dtype, verdict in verdicts_of(name).items():
            tally("PyTorch's operators, real and complex", verdict.kind)
            refused = verdict.kind == REFUSED and (dtype.is_complex or name in MAY_BE_REFUSED)
            # PyTorch itself does not differentiate some on complex values.
            nothing = verdict.kind == NOT_JUDGED and dtype.is_complex
            if verdict.kind != RIGHT and not refused and not nothing:
                faults.append(f"{name} ({dtype}): {verdict.kind}: {verdict.reason}")
    assert not faults, "\n".join(faults)


def test_what_is_not_judged_exists():
    assert set(UNJUDGED) <= set(OPERATORS)
