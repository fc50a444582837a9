"""What a model looks at: attention maps and feature maps of any family, and a picture of them."""
