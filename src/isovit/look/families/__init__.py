"""Where each family attends: a generator of its attention maps, in the order in which they run."""
