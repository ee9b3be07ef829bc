"""Triton kernels and their launchers: tensors in, tensors out, no autograd.

| module | what it computes |
|---|---|
| `gram_project` | G = J J^T, p = J r, rr = r^T r, and their pullback |
| `woodbury` | log-determinant and inverse of cI + S G S, one factorisation a sample |
| `woodbury_float64` | the same in float64 for samples that float32 lost, from J or `gram_tail` |
| `gram_tail`, `gram_tail_backward` | `gram_project` of a last layer, together with it |
| `tangent_activation` | phi(a) and phi'(a) T, and their pullback |
| `latent_layer` | a linear layer of the latents, phi behind it and the tangents, and the pullback |
| `tangent_conv_transpose` | a layer behind phi, on values and tangents, and its pullback |
| `tangent_conv`, `tangent_linear` | the same for convolutions and linear layers |
| `activations` | phi, phi' and phi'' of each kind, for any kernel that applies one |
| `audit` | compiles every configuration for every supported GPU, without one |
| `hub` | in a clone alone: writes two of them as a kernel of the Hugging Face hub |

Nothing here imports the rest of the package, and importing this package does not import Triton.
"""
