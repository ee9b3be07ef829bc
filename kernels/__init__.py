"""Triton kernels and their launchers: tensors in, tensors out, no autograd.

| module | what it computes |
|---|---|
| `gram_project` | G = J J^T, p = J r, rr = r^T r, and their pullback |
| `woodbury` | log-determinant and inverse of cI + S G S, one factorisation a sample |
| `woodbury_float64` | the same again in float64, from J, for samples that float32 has lost |
| `tangent_activation` | phi(a) and phi'(a) T, and their pullback |
| `activations` | phi, phi' and phi'' of each kind, for any kernel that applies one |
| `audit` | compiles every configuration for every supported GPU, without one |

Nothing here imports the rest of the package, and importing this package does not import Triton.
"""
