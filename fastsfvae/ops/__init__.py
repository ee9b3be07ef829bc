"""Operations: torch.library ops over the kernels, their torch twins, and the autograd boundaries."""
