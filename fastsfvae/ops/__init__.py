"""Operations: torch.library ops, their torch twins, and the autograd boundaries."""
