"""The plain oracles: each operation as its formula reads, differentiable to any order."""

from fastsfvae.reference.gram_project import gram_project as gram_project
from fastsfvae.reference.low_rank import low_rank_terms as low_rank_terms
from fastsfvae.reference.woodbury import woodbury as woodbury
