"""One module per objective, each with the model class of that objective."""
