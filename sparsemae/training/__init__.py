"""The one training loop (Lightning Fabric), for every task. Knows no task."""
