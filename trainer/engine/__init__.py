"""How a step is computed: DeepSpeed, gradients, optimizer, losses, kernels. May import settings/, ranks/."""
