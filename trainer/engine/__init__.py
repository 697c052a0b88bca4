"""How a step is computed: DeepSpeed, gradients, optimizer, losses, kernels. May ask settings/ and ranks/."""
