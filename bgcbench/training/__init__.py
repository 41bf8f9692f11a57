"""Training one network on one data set: recipes, the loop, checkpoints, several processes."""
