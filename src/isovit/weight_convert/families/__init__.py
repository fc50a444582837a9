"""One module per family: ``TABLES``, from format name to the rename table of a config."""
