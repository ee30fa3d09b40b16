"""The whole chain on the embedded images, in minutes, beside the paper's baselines."""
