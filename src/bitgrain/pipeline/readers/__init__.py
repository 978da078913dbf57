"""Engines that are asked what a written file says: each reads it with its own code, and gives logits."""
