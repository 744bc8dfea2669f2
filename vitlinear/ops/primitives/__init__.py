"""Building blocks that have fast forms, a folder each: `torch.py` has the plain operations, `autograd.py` a backward
pass that keeps less, `triton.py` kernels. `_dispatch.py` has the rule which of them runs."""
