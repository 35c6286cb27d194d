"""card.py: the counts against a counter of live tensors at the shape of Qwen2.5-1.5B, and the plan on cards of four sizes."""
