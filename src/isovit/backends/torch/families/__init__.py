"""One module per family, each with the model class of that family."""
