"""Networks: backbones, heads, and the model that joins them."""
