"""Images in: sources, transforms, stateless sampling. Knows nothing of models."""
