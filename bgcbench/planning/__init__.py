"""Which convolution of a network becomes what: costs, losses, and the choice that is best for a budget."""
